#pragma once

// Sums of terms, and the stage u = sum_k c_k t_k + channel_bias, unit by unit.

#include "../math/combine.h"
#include "walk.cuh"

namespace ssp {

// A sum of kTerms terms; 0: of as many as the parameters say; kAtMost: of so many, but no more.
template <int kTerms, Access kAccess, bool kAtMost = false>
struct Terms {
  static constexpr int kSlots = kTerms == 0 ? kMaxTerms : kTerms;

  struct Raw {
    RawUnit<kAccess> terms[kSlots];
  };

  SSP_DEVICE explicit Terms(const TermsParams& terms) : params(terms) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (has(k)) coefficients[k] = value_or(params.coefficient_tensor, k, params.coefficients[k]);
    }
  }

  SSP_DEVICE bool has(int k) const { return (kTerms != 0 && !kAtMost) || k < params.count; }

  SSP_DEVICE Raw load(int64_t offset, int length) const {
    Raw raw;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (has(k)) raw.terms[k] = load_unit<kAccess>(params.terms[k], offset, length);
    }
    return raw;
  }

  // total += sum_k c_k t_k
  SSP_DEVICE void add(const Raw& raw, float (&total)[kUnit]) const { add_from<0>(raw, total); }

  // The same, each term loaded when its turn comes: registers would not hold many.
  SSP_DEVICE void load_and_add(int64_t offset, int length, float (&total)[kUnit]) const {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (has(k)) add_term(k, load_unit<kAccess>(params.terms[k], offset, length), total);
    }
  }

  // total = sum_k c_k t_k
  SSP_DEVICE void sum(const Raw& raw, float (&total)[kUnit]) const {
    unpack(raw.terms[0], params.terms[0].storage, total);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) total[e] *= coefficients[0];
    add_from<1>(raw, total);
  }

  template <int kFirst>
  SSP_DEVICE void add_from(const Raw& raw, float (&total)[kUnit]) const {
#pragma unroll
    for (int k = kFirst; k < kSlots; ++k) {
      if (has(k)) add_term(k, raw.terms[k], total);
    }
  }

  SSP_DEVICE void add_term(int k, const RawUnit<kAccess>& raw, float (&total)[kUnit]) const {
    float term[kUnit];
    unpack(raw, params.terms[k].storage, term);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) total[e] = plus_term(total[e], coefficients[k], term[e]);
  }

  const TermsParams& params;
  float coefficients[kSlots];
};

// Blocks of this many threads, and how many of them a multiprocessor is to hold: no more than leave
// them their registers. (With three and one unit in flight, moments took 15% longer on an H200.)
constexpr int kStageThreads = 256;
constexpr int kLeastStageBlocks = 2;
template <Access kAccess>
constexpr int kStageBlocks = kAccess == Access::kAny ? 1 : kLeastStageBlocks;

// u as stored.
template <bool kRows, int kTerms, Access kAccess>
struct Stage {
  using Sum = Terms<kTerms, kAccess>;
  // Units whose loads a thread has in flight: registers allow it more of fewer terms, of narrow
  // ones, and in planes, where it has no parameters for each element of a unit.
  static constexpr bool kRoom = !kRows || kAccess == Access::kNarrow;
  static constexpr int kBatch = kTerms == 0   ? 1
                                : kTerms == 1 ? (kRoom ? 4 : 2)
                                : kTerms == 2 ? 2
                                              : (kRoom ? 2 : 1);

  SSP_DEVICE Stage(const StageParams& stage, const Walk<kRows>& walk,
                   const ChannelLoad<kRows>& biases)
      : params(stage),
        sum(stage.sum),
        first_channel(walk.first_channel()),
        bias(biases.or_else(0)) {}

  // Fills u, and returns it packed in its dtype.
  SSP_DEVICE RawUnit<kAccess> produce(const typename Sum::Raw& raw, const Place& place,
                                      float (&u)[kUnit]) const {
    sum.sum(raw, u);
    if (params.channel_bias.data != nullptr) {
      auto added = bias;
      if constexpr (!kRows) added[0] = value_at(params.channel_bias, first_channel + place.column);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) u[e] += added[e];
    }
    const auto stored = pack<kAccess>(u, params.u.storage);
    if (params.u.data != nullptr) {
      store_unit<kAccess>(params.u, place.offset, place.length, stored);
    }
    unpack(stored, params.u.storage, u);
    return stored;
  }

  const StageParams& params;
  Sum sum;
  int64_t first_channel;   // of the tile
  PerChannel<kRows> bias;  // of a thread's units, in rows
};

// Calls f(place, u) for the units begin, begin + step, ... before end.
template <bool kRows, int kTerms, Access kAccess, class F>
SSP_DEVICE void for_each_stage_unit(const Walk<kRows>& walk,
                                    const Stage<kRows, kTerms, kAccess>& stage, const F& f) {
  constexpr int kBatch = Stage<kRows, kTerms, kAccess>::kBatch;
  const uint32_t step = walk.g.active;
  for (uint32_t unit = walk.begin; unit < walk.end; unit += kBatch * step) {
    typename Terms<kTerms, kAccess>::Raw raw[kBatch];
    Place places[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (unit + i * step >= walk.end) continue;
      places[i] = place_of<kAccess>(walk, unit + i * step);
      raw[i] = stage.sum.load(places[i].offset, places[i].length);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (unit + i * step >= walk.end) continue;
      float u[kUnit];
      stage.produce(raw[i], places[i], u);
      f(places[i], u);
    }
  }
}

inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

inline uintptr_t addresses(const TermsParams& terms) {
  uintptr_t bits = 0;
  for (int k = 0; k < terms.count; ++k) bits |= address(terms.terms[k].data);
  return bits;
}

// Whether an operand that is there has elements of 16 bits.
inline bool is_narrow(const Operand& operand) {
  return operand.data == nullptr || operand.storage != Storage::kFloat;
}

inline bool is_narrow(const TermsParams& terms) {
  for (int k = 0; k < terms.count; ++k) {
    if (!is_narrow(terms.terms[k])) return false;
  }
  return true;
}

// How to access operands whose addresses or to `bits`, and which are all narrow or not.
inline Access access_of(const Extent& extent, uintptr_t bits, bool narrow) {
  if (extent.line_length() % kUnit != 0 || bits % 16 != 0) return Access::kAny;
  return narrow ? Access::kNarrow : Access::kWide;
}

// Calls f<kRows, kAccess>().
template <class F>
auto with_layout_variant(bool rows, Access access, const F& f) {
  const auto with_rows = [&]<bool kRows>() {
    switch (access) {
      case Access::kNarrow:
        return f.template operator()<kRows, Access::kNarrow>();
      case Access::kWide:
        return f.template operator()<kRows, Access::kWide>();
      default:
        return f.template operator()<kRows, Access::kAny>();
    }
  };
  return rows ? with_rows.template operator()<true>() : with_rows.template operator()<false>();
}

// Calls f<kRows, kTerms, kAccess>(): tensors that are not aligned take the general path.
template <class F>
auto with_stage_variant(bool rows, int count, Access access, const F& f) {
  return with_layout_variant(rows, access, [&]<bool kRows, Access kAccess>() {
    if constexpr (kAccess == Access::kAny) {
      return f.template operator()<kRows, 0, kAccess>();
    } else {
      switch (count) {
        case 1:
          return f.template operator()<kRows, 1, kAccess>();
        case 2:
          return f.template operator()<kRows, 2, kAccess>();
        case 3:
          return f.template operator()<kRows, 3, kAccess>();
        default:
          return f.template operator()<kRows, 0, kAccess>();
      }
    }
  });
}

}  // namespace ssp
