#pragma once

// The inner loops: plain loops over runs of elements, compiled once per instruction set.

#include <cstdint>

#include "math/combine.h"

namespace ssp {

enum class Dtype : int { kFloat, kDouble, kHalf, kBfloat16 };

// Elements of the longest run that the elementwise kernels see: with all its operands it fits L1.
constexpr int64_t kTile = 512;

// The parameters of a run's channels: one value each (a run inside one channel) or one per element.
template <class A>
struct Parameters {
  const A* mean;
  const A* rstd;
  const A* gamma;
  const A* beta;
  const A* mean_dy = nullptr;       // see math/normalize.h; null with fixed statistics
  const A* mean_dy_xhat = nullptr;  // likewise
  bool per_element = false;
};

// A is the arithmetic type, float or double. Every function gives the same bits whatever
// instruction set it is compiled for: sums have a fixed number of lanes, folded in a fixed order.
template <class A>
struct TileKernels {
  // Storage of another dtype to arithmetic, and back (rounded to nearest even).
  void (*load)(Dtype dtype, const void* from, A* to, int64_t n);
  void (*store)(Dtype dtype, const A* from, void* to, int64_t n);

  // out = sum_k c_k t_k [+ *bias], up to kMaxTerms + 1 terms.
  void (*combine)(int count, const A* const* terms, const A* coefficients, const A* bias, A* out,
                  int64_t n);
  // z = act(gamma xhat + beta)
  void (*normalize_act)(int activation, const Parameters<A>& p, const A* u, A* z, int64_t n);
  // One bit per element of z: is_positive(z), which is is_positive(y) where act is piecewise
  // linear.
  void (*pack_mask)(const A* z, uint8_t* bits, int64_t n);
  // `positive` has room for n rounded up to a multiple of 8.
  void (*unpack_mask)(const uint8_t* bits, uint8_t* positive, int64_t n);

  // dy and dy xhat; added to what is there where parameters are per element.
  void (*backward_terms)(int activation, const Parameters<A>& p, A scale, const A* dz, const A* u,
                         A* dy, A* dy_xhat, int64_t n);
  // du without the extras
  void (*backward)(int activation, const Parameters<A>& p, A scale, const A* dz, const A* u, A* du,
                   int64_t n);
  void (*backward_masked)(int activation, const Parameters<A>& p, A scale, const A* dz,
                          const uint8_t* positive, A* du, int64_t n);

  // sums[j] += sum_r x[r stride + j]
  void (*column_sums)(const A* x, int64_t rows, int64_t stride, int64_t width, double* sums);
  // The same of (x - centre[j])^2, for at most 64 rows: squares do not cancel, and are summed in A.
  void (*column_squares)(const A* x, int64_t rows, int64_t stride, int64_t width, const A* centre,
                         double* sums);
  double (*run_sum)(const A* x, int64_t n);
  double (*run_squares)(const A* x, int64_t n, A centre);
  double (*run_dot)(const A* a, const A* b, int64_t n);

  void (*linf_step)(const A* x_adv, const A* grad, const A* x, A step_size, A eps, A low, A high,
                    A* out, int64_t n);
  void (*l2_displacement)(const A* x_adv, const A* grad, const A* x, A step_size, A length, A* out,
                          int64_t n);
  void (*l2_projection)(const A* x, const A* displacement, A shrink, A low, A high, A* out,
                        int64_t n);
};

// The kernels of the instruction set in use (see dispatch.cpp); throws where SSP_FUSED_CPU_ISA
// names one that cannot be used.
template <class A>
const TileKernels<A>& tiles();

}  // namespace ssp
