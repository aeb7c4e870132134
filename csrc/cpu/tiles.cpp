// Compiled once per instruction set, with SSP_ISA naming it. Everything but the two tables has
// internal linkage or is always inlined: a function with one name in several objects would be
// merged by the linker, and an AVX-512 copy kept for every processor.

#include "tiles.h"

#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "convert.h"
#include "math/activation.h"
#include "math/attack.h"
#include "math/combine.h"
#include "math/normalize.h"

// The iterations of the loop that follows touch no memory in common: a result lies apart from the
// operands, or exactly where one does.
// (Left to itself, the compiler gives up where more than a few pairs would have to be compared.)
#if defined(__clang__)
#define SSP_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define SSP_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace ssp {
namespace {

// Sums run in kLanes lanes, in double; squares, which do not cancel, in A for kLaneRows rows.
constexpr int64_t kLanes = 32;
constexpr int64_t kLaneRows = 64;

SSP_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A channel parameter along a run.
template <class A, bool kPerElement>
struct Parameter {
  explicit Parameter(const A* p) : values(p), value(kPerElement ? A(0) : *p) {}
  SSP_HD A operator[](int64_t i) const {
    if constexpr (kPerElement) return values[i];
    return value;
  }
  const A* values;
  A value;
};

// Calls f with the activation, and whether parameters are per element, as template arguments.
template <class F>
SSP_HD void specialize(int activation, bool per_element, const F& f) {
  const auto with = [&](auto code) {
    if (per_element) {
      f.template operator()<decltype(code)::value, true>();
    } else {
      f.template operator()<decltype(code)::value, false>();
    }
  };
  switch (activation) {
    case kRelu:
      return with(std::integral_constant<int, kRelu>{});
    case kLeakyRelu:
      return with(std::integral_constant<int, kLeakyRelu>{});
    case kSilu:
      return with(std::integral_constant<int, kSilu>{});
    default:
      return with(std::integral_constant<int, kIdentity>{});
  }
}

// --- storage ------------------------------------------------------------------------------------

template <class A>
void load(Dtype dtype, const void* from, A* to, int64_t n) {
  const auto* bits = static_cast<const uint16_t*>(from);
  if (dtype == Dtype::kHalf) {
    if constexpr (sizeof(A) == sizeof(float)) from_half(bits, to, n);
  } else if (dtype == Dtype::kBfloat16) {
    SSP_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat16(bits[i]);
  } else {
    memcpy(to, from, n * sizeof(A));
  }
}

template <class A>
void store(Dtype dtype, const A* from, void* to, int64_t n) {
  auto* bits = static_cast<uint16_t*>(to);
  if (dtype == Dtype::kHalf) {
    if constexpr (sizeof(A) == sizeof(float)) to_half(from, bits, n);
  } else if (dtype == Dtype::kBfloat16) {
    SSP_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) bits[i] = to_bfloat16(from[i]);
  } else {
    memcpy(to, from, n * sizeof(A));
  }
}

// --- elementwise --------------------------------------------------------------------------------

template <int kCount, class A>
void combine_loop(const A* const* terms, const A* coefficients, const A* bias, A* out, int64_t n) {
  const A* t[kCount];
  A c[kCount];
  for (int k = 0; k < kCount; ++k) {
    t[k] = terms[k];
    c[k] = coefficients[k];
  }
  const auto element = [&](int64_t i) {
    A values[kCount];
    for (int k = 0; k < kCount; ++k) values[k] = t[k][i];
    return weighted_sum<kCount>(c, values);
  };
  if (bias == nullptr) {
    SSP_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) out[i] = element(i);
  } else {
    const A b = *bias;
    SSP_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) out[i] = element(i) + b;
  }
}

template <class A>
void combine(int count, const A* const* terms, const A* coefficients, const A* bias, A* out,
             int64_t n) {
  static_assert(kMaxTerms == 6, "one case below per number of terms, and one for a vector bias");
  switch (count) {
    case 1:
      return combine_loop<1>(terms, coefficients, bias, out, n);
    case 2:
      return combine_loop<2>(terms, coefficients, bias, out, n);
    case 3:
      return combine_loop<3>(terms, coefficients, bias, out, n);
    case 4:
      return combine_loop<4>(terms, coefficients, bias, out, n);
    case 5:
      return combine_loop<5>(terms, coefficients, bias, out, n);
    case 6:
      return combine_loop<6>(terms, coefficients, bias, out, n);
    case 7:
      return combine_loop<7>(terms, coefficients, bias, out, n);
  }
}

template <class A>
void normalize_act(int activation, const Parameters<A>& p, const A* u, A* z, int64_t n) {
  specialize(activation, p.per_element, [&]<int kActivation, bool kPerElement>() {
    const Parameter<A, kPerElement> mean(p.mean), rstd(p.rstd), gamma(p.gamma), beta(p.beta);
    SSP_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const A xhat = normalized(u[i], mean[i], rstd[i]);
      z[i] = activate<kActivation>(affine(xhat, gamma[i], beta[i]));
    }
  });
}

#if defined(__AVX512F__)
// The bits of whole bytes, is_positive of sixteen elements at once. Returns how many it did.
SSP_HD int64_t pack_bytes(const float* z, uint8_t* bits, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __mmask16 positive =
        _mm512_cmp_ps_mask(_mm512_loadu_ps(z + i), _mm512_setzero_ps(), _CMP_NLE_UQ);
    memcpy(bits + i / 8, &positive, 2);
  }
  return i;
}
#elif defined(__AVX__)
// The bits of whole bytes, is_positive of eight elements at once. Returns how many elements it did.
SSP_HD int64_t pack_bytes(const float* z, uint8_t* bits, int64_t n) {
  const __m256 zero = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 positive = _mm256_cmp_ps(_mm256_loadu_ps(z + i), zero, _CMP_NLE_UQ);
    bits[i / 8] = static_cast<uint8_t>(_mm256_movemask_ps(positive));
  }
  return i;
}
#else
SSP_HD int64_t pack_bytes(const float*, uint8_t*, int64_t) { return 0; }
#endif
SSP_HD int64_t pack_bytes(const double*, uint8_t*, int64_t) { return 0; }

template <class A>
void pack_mask(const A* z, uint8_t* bits, int64_t n) {
  for (int64_t begin = pack_bytes(z, bits, n); begin < n; begin += kTile) {
    const int64_t count = smaller(n - begin, kTile);
    uint8_t positive[kTile + 8];
    SSP_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) positive[i] = is_positive(z[begin + i]);
    memset(positive + count, 0, 8);
    for (int64_t i = 0; i < count; i += 8) {
      uint64_t bytes;
      memcpy(&bytes, positive + i, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
      bytes = __builtin_bswap64(bytes);
#endif
      // The product gathers the eight low bits in its highest byte, the first the lowest.
      bits[(begin + i) / 8] = static_cast<uint8_t>((bytes * 0x0102040810204080u) >> 56);
    }
  }
}

#if defined(__AVX2__)
// 0 or 1 for each bit, 32 at once. Returns how many it did.
SSP_HD int64_t unpack_words(const uint8_t* bits, uint8_t* positive, int64_t n) {
  // Every lane of eight bytes gets one byte of the word, and each of its bytes keeps one bit.
  const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202,
                                           0x0101010101010101, 0x0000000000000000);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i one = _mm256_set1_epi8(1);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    int32_t word;
    memcpy(&word, bits + i / 8, 4);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), spread);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(positive + i), _mm256_and_si256(set, one));
  }
  return i;
}
#else
SSP_HD int64_t unpack_words(const uint8_t*, uint8_t*, int64_t) { return 0; }
#endif

void unpack_mask(const uint8_t* bits, uint8_t* positive, int64_t n) {
  for (int64_t i = unpack_words(bits, positive, n); i < n; i += 8) {
    // Every byte of the product keeps one bit of the eight, the first the lowest, as 0 or not.
    const uint64_t spread = (bits[i / 8] * 0x0101010101010101u) & 0x8040201008040201u;
    uint64_t bytes = ((spread + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    bytes = __builtin_bswap64(bytes);
#endif
    memcpy(positive + i, &bytes, 8);
  }
}

template <class A>
void backward_terms(int activation, const Parameters<A>& p, A scale, const A* dz, const A* u,
                    A* dys, A* dy_xhats, int64_t n) {
  specialize(activation, p.per_element, [&]<int kActivation, bool kPerElement>() {
    const Parameter<A, kPerElement> mean(p.mean), rstd(p.rstd), gamma(p.gamma), beta(p.beta);
    SSP_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const A xhat = normalized(u[i], mean[i], rstd[i]);
      const A y = affine(xhat, gamma[i], beta[i]);
      const A dy = activation_backward<kActivation>(scale * dz[i], y);
      dys[i] = kPerElement ? dys[i] + dy : dy;
      dy_xhats[i] = kPerElement ? dy_xhats[i] + dy * xhat : dy * xhat;
    }
  });
}

template <class A>
void backward(int activation, const Parameters<A>& p, A scale, const A* dz, const A* u, A* du,
              int64_t n) {
  specialize(activation, p.per_element, [&]<int kActivation, bool kPerElement>() {
    const Parameter<A, kPerElement> mean(p.mean), rstd(p.rstd), gamma(p.gamma), beta(p.beta);
    if (p.mean_dy == nullptr) {
      SSP_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        const A y = affine(normalized(u[i], mean[i], rstd[i]), gamma[i], beta[i]);
        const A dy = activation_backward<kActivation>(scale * dz[i], y);
        du[i] = input_gradient(dy, rstd[i], gamma[i]);
      }
      return;
    }
    const Parameter<A, kPerElement> mean_dy(p.mean_dy), mean_dy_xhat(p.mean_dy_xhat);
    SSP_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const A xhat = normalized(u[i], mean[i], rstd[i]);
      const A y = affine(xhat, gamma[i], beta[i]);
      const A dy = activation_backward<kActivation>(scale * dz[i], y);
      du[i] = input_gradient(dy, xhat, rstd[i], gamma[i], mean_dy[i], mean_dy_xhat[i]);
    }
  });
}

template <class A>
void backward_masked(int activation, const Parameters<A>& p, A scale, const A* dz,
                     const uint8_t* positive, A* du, int64_t n) {
  specialize(activation, p.per_element, [&]<int kActivation, bool kPerElement>() {
    const Parameter<A, kPerElement> rstd(p.rstd), gamma(p.gamma);
    SSP_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const A dy = masked<kActivation>(scale * dz[i], positive[i] != 0);
      du[i] = input_gradient(dy, rstd[i], gamma[i]);
    }
  });
}

// --- sums ---------------------------------------------------------------------------------------

// The sum of the lanes, halves onto halves; in place, because a copy would stall on its own stores.
template <int64_t kHalf = kLanes / 2, class A>
SSP_HD double fold(A (&lanes)[kLanes]) {
  for (int64_t j = 0; j < kHalf; ++j) lanes[j] += lanes[j + kHalf];
  if constexpr (kHalf > 1) {
    return fold<kHalf / 2>(lanes);
  } else {
    return lanes[0];
  }
}

template <class A>
void column_sums(const A* x, int64_t rows, int64_t stride, int64_t width, double* sums) {
  int64_t begin = 0;
  for (; begin + kLanes <= width; begin += kLanes) {
    double lanes[kLanes] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[r * stride + begin + j];
    }
    for (int64_t j = 0; j < kLanes; ++j) sums[begin + j] += lanes[j];
  }
  for (; begin < width; ++begin) {
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += x[r * stride + begin];
    sums[begin] += sum;
  }
}

template <class A>
void column_squares(const A* x, int64_t rows, int64_t stride, int64_t width, const A* centre,
                    double* sums) {
  int64_t begin = 0;
  for (; begin + kLanes <= width; begin += kLanes) {
    A lanes[kLanes] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < kLanes; ++j) {
        const A d = x[r * stride + begin + j] - centre[begin + j];
        lanes[j] += d * d;
      }
    }
    for (int64_t j = 0; j < kLanes; ++j) sums[begin + j] += lanes[j];
  }
  for (; begin < width; ++begin) {
    A sum = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const A d = x[r * stride + begin] - centre[begin];
      sum += d * d;
    }
    sums[begin] += sum;
  }
}

template <class A>
double run_sum(const A* x, int64_t n) {
  double lanes[kLanes];
  if (n < kLanes) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    return sum;
  }
  for (int64_t j = 0; j < kLanes; ++j) lanes[j] = x[j];
  int64_t i = kLanes;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += x[i + j];
  return fold(lanes);
}

template <class A>
double run_squares(const A* x, int64_t n, A centre) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kLanes * kLaneRows) {
    const int64_t end = begin + smaller(n - begin, kLanes * kLaneRows);
    A lanes[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) {
        const A d = x[i + j] - centre;
        lanes[j] += d * d;
      }
    }
    for (int64_t j = 0; i + j < end; ++j) {
      const A d = x[i + j] - centre;
      lanes[j] += d * d;
    }
    total += fold(lanes);
  }
  return total;
}

// Products and sums in double, where no product of floats overflows or is rounded.
template <class A>
double run_dot(const A* a, const A* b, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      lanes[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
    }
  }
  for (int64_t j = 0; i + j < n; ++j) {
    lanes[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
  }
  return fold(lanes);
}

// --- attack steps -------------------------------------------------------------------------------

template <class A>
void linf_steps(const A* x_adv, const A* grad, const A* x, A step_size, A eps, A low, A high,
                A* out, int64_t n) {
  SSP_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out[i] = linf_step(x_adv[i], grad[i], x[i], step_size, eps, low, high);
  }
}

template <class A>
void l2_displacements(const A* x_adv, const A* grad, const A* x, A step_size, A length, A* out,
                      int64_t n) {
  SSP_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out[i] = l2_displacement(x_adv[i], grad[i], x[i], step_size, length);
  }
}

template <class A>
void l2_projections(const A* x, const A* displacement, A shrink, A low, A high, A* out, int64_t n) {
  SSP_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) out[i] = l2_projection(x[i], displacement[i], shrink, low, high);
}

template <class A>
constexpr TileKernels<A> table() {
  return {load<A>,
          store<A>,
          combine<A>,
          normalize_act<A>,
          pack_mask<A>,
          unpack_mask,
          backward_terms<A>,
          backward<A>,
          backward_masked<A>,
          column_sums<A>,
          column_squares<A>,
          run_sum<A>,
          run_squares<A>,
          run_dot<A>,
          linf_steps<A>,
          l2_displacements<A>,
          l2_projections<A>};
}

}  // namespace

namespace SSP_ISA {
extern const TileKernels<float> float_tiles;
extern const TileKernels<double> double_tiles;
constexpr TileKernels<float> float_tiles = table<float>();
constexpr TileKernels<double> double_tiles = table<double>();
}  // namespace SSP_ISA

}  // namespace ssp
