#pragma once

// Sums of terms, and the stage u = sum_k c_k t_k + channel_bias, unit by unit.

#include "../math/combine.h"
#include "walk.cuh"

namespace ssp {

// A sum of kTerms terms; 0: of as many as the parameters say.
template <int kTerms, bool kAligned>
struct Terms {
  static constexpr int kSlots = kTerms == 0 ? kMaxTerms : kTerms;

  struct Raw {
    RawUnit terms[kSlots];
  };

  SSP_DEVICE explicit Terms(const TermsParams& terms) : params(terms) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (has(k)) coefficients[k] = value_or(params.coefficient_tensor, k, params.coefficients[k]);
    }
  }

  SSP_DEVICE bool has(int k) const { return kTerms != 0 || k < params.count; }

  SSP_DEVICE Raw load(int64_t offset, int length) const {
    Raw raw;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (has(k)) raw.terms[k] = load_unit<kAligned>(params.terms[k], offset, length);
    }
    return raw;
  }

  // total += sum_k c_k t_k
  SSP_DEVICE void add(const Raw& raw, float (&total)[kUnit]) const { add_from<0>(raw, total); }

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
      if (!has(k)) continue;
      float term[kUnit];
      unpack(raw.terms[k], params.terms[k].storage, term);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) total[e] = plus_term(total[e], coefficients[k], term[e]);
    }
  }

  const TermsParams& params;
  float coefficients[kSlots];
};

// u as stored.
template <bool kRows, int kTerms, bool kAligned>
struct Stage {
  using Sum = Terms<kTerms, kAligned>;
  // Units whose loads a thread has in flight: registers allow it more of fewer terms.
  static constexpr int kBatch = kTerms == 1 ? 4 : kTerms == 0 ? 1 : 2;

  // `bias`: the table of the channels' biases, null without any.
  SSP_DEVICE Stage(const StageParams& stage, const float* bias_table)
      : params(stage), sum(stage.sum), bias(bias_table) {}

  // Fills u, and returns it packed in its dtype.
  SSP_DEVICE RawUnit produce(const typename Sum::Raw& raw, const Place& place,
                             float (&u)[kUnit]) const {
    sum.sum(raw, u);
    if (bias != nullptr) {
      const auto added = PerChannel<kRows>::of(bias, place.column);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) u[e] += added[e];
    }
    const RawUnit stored = pack(u, params.u.storage);
    if (params.u.data != nullptr) {
      store_unit<kAligned>(params.u, place.offset, place.length, stored);
    }
    unpack(stored, params.u.storage, u);
    return stored;
  }

  const StageParams& params;
  Sum sum;
  const float* bias;
};

// Calls f(place, u) for the units begin, begin + step, ... before end.
template <bool kRows, int kTerms, bool kAligned, class F>
SSP_DEVICE void for_each_stage_unit(const Walk<kRows>& walk,
                                    const Stage<kRows, kTerms, kAligned>& stage, const F& f) {
  constexpr int kBatch = Stage<kRows, kTerms, kAligned>::kBatch;
  const uint32_t step = walk.g.active;
  for (uint32_t unit = walk.begin; unit < walk.end; unit += kBatch * step) {
    typename Terms<kTerms, kAligned>::Raw raw[kBatch];
    Place places[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (unit + i * step >= walk.end) continue;
      places[i] = walk.at(unit + i * step);
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

// Whether all units are whole and on 16 byte boundaries, for operands whose addresses or to `bits`.
inline bool is_aligned(const Extent& extent, uintptr_t bits) {
  return extent.line_length() % kUnit == 0 && bits % 16 == 0;
}

// Calls f<kRows, kTerms, kAligned>(): tensors that are not aligned take the general path.
template <class F>
void with_stage_variant(bool rows, int count, bool aligned, const F& f) {
  const auto with_rows = [&]<bool kRows>() {
    if (!aligned) return f.template operator()<kRows, 0, false>();
    switch (count) {
      case 1:
        return f.template operator()<kRows, 1, true>();
      case 2:
        return f.template operator()<kRows, 2, true>();
      case 3:
        return f.template operator()<kRows, 3, true>();
      default:
        return f.template operator()<kRows, 0, true>();
    }
  };
  return rows ? with_rows.template operator()<true>() : with_rows.template operator()<false>();
}

// Calls f<kRows, kAligned>().
template <class F>
void with_layout_variant(bool rows, bool aligned, const F& f) {
  const auto with_rows = [&]<bool kRows>() {
    return aligned ? f.template operator()<kRows, true>() : f.template operator()<kRows, false>();
  };
  return rows ? with_rows.template operator()<true>() : with_rows.template operator()<false>();
}

}  // namespace ssp
