#pragma once

// The backward of normalization and activation, unit by unit.

#include <type_traits>

#include "block_sum.cuh"
#include "norm_backward.h"
#include "normalize.cuh"
#include "stage.cuh"

namespace ssp {

// What input_gradient subtracts, beside the affine parameters: tables over the tile's channels.
struct GradientTables : AffineTables {
  static constexpr int kTables = AffineTables::kTables + 2;

  SSP_DEVICE GradientTables(float* shared, int table)
      : AffineTables(shared, table), mean_dy(AffineTables::end()), mean_dy_xhat(mean_dy + table) {}
  SSP_DEVICE void* end() const { return mean_dy_xhat + (mean_dy_xhat - mean_dy); }

  float* mean_dy;
  float* mean_dy_xhat;
};

template <bool kRows>
SSP_DEVICE Affine<kRows> affine_of(const Walk<kRows>& walk, const NormGradient& gradient) {
  return affine_of(walk, gradient.mean, gradient.rstd, gradient.gamma, gradient.beta);
}

SSP_DEVICE float scale_of(const NormGradient& gradient) {
  return value_or(gradient.scale_tensor, 0, gradient.scale);
}

// dy = scale dz act'(y)
SSP_DEVICE void activation_backward_unit(int activation, float scale, const float (&dz)[kUnit],
                                         const float (&y)[kUnit], float (&dy)[kUnit]) {
  with_activation(activation, [&]<int kActivation>() {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      dy[e] = activation_backward<kActivation>(scale * dz[e], y[e]);
    }
  });
}

SSP_DEVICE void masked_unit(int activation, float scale, const float (&dz)[kUnit], uint32_t bits,
                            float (&dy)[kUnit]) {
  with_activation(activation, [&]<int kActivation>() {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      dy[e] = masked<kActivation>(scale * dz[e], (bits >> e & 1) != 0);
    }
  });
}

// xhat, y and dy of a unit.
template <bool kRows>
struct UnitGradient {
  SSP_DEVICE UnitGradient(const Affine<kRows>& parameters, int activation, float scale,
                          const float (&dz)[kUnit], const float (&u)[kUnit]) {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      xhat[e] = parameters.xhat(e, u[e]);
      y[e] = parameters.y(e, xhat[e]);
    }
    activation_backward_unit(activation, scale, dz, y, dy);
  }

  float xhat[kUnit];
  float y[kUnit];
  float dy[kUnit];
};

// The means of gamma dy and gamma dy xhat over the elements that share statistics.
template <bool kRows>
struct GradientMeans {
  PerChannel<kRows> dy = PerChannel<kRows>::of(0);
  PerChannel<kRows> dy_xhat = PerChannel<kRows>::of(0);

  // From the sums of dy and dy xhat over `count` elements.
  SSP_DEVICE void scale(const PerChannel<kRows>& gamma, double count) {
    const double share = 1 / count;
#pragma unroll
    for (int e = 0; e < PerChannel<kRows>::kWidth; ++e) {
      dy[e] = static_cast<float>(gamma[e] * (dy[e] * share));
      dy_xhat[e] = static_cast<float>(gamma[e] * (dy_xhat[e] * share));
    }
  }
};

// du without the extras, with the statistics' share.
template <bool kRows>
SSP_DEVICE void own_gradient(const UnitGradient<kRows>& unit, const Affine<kRows>& affine,
                             const GradientMeans<kRows>& means, float (&du)[kUnit]) {
#pragma unroll
  for (int e = 0; e < kUnit; ++e) {
    du[e] = input_gradient(unit.dy[e], unit.xhat[e], affine.rstd[e], affine.gamma[e], means.dy[e],
                           means.dy_xhat[e]);
  }
}

// The same with fixed statistics.
template <bool kRows>
SSP_DEVICE void fixed_gradient(const float (&dy)[kUnit], const PerChannel<kRows>& rstd,
                               const PerChannel<kRows>& gamma, float (&du)[kUnit]) {
#pragma unroll
  for (int e = 0; e < kUnit; ++e) du[e] = input_gradient(dy[e], rstd[e], gamma[e]);
}

// The later stages' gradients, added to a unit of du. kFew: there is one at most, loaded ahead.
template <Access kAccess, bool kFew>
struct Extras {
  using Sum = Terms<kFew ? 1 : 0, kAccess, kFew>;
  struct None {};
  using Raw = std::conditional_t<kFew, typename Sum::Raw, None>;

  SSP_DEVICE explicit Extras(const TermsParams& params) : sum(params) {}

  SSP_DEVICE Raw load(const Place& place) const {
    if constexpr (kFew) {
      return sum.load(place.offset, place.length);
    } else {
      return {};
    }
  }
  SSP_DEVICE void add(const Raw& raw, const Place& place, float (&du)[kUnit]) const {
    if constexpr (kFew) {
      sum.add(raw, du);
    } else {
      sum.load_and_add(place.offset, place.length, du);
    }
  }

  Sum sum;
};

// Sums of a thread's elements by channel.
template <bool kRows>
struct ThreadSums {
  SSP_DEVICE void add(const UnitGradient<kRows>& unit, int length) {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      if (e >= length) continue;
      dy[e] += unit.dy[e];
      dy_xhat[e] += unit.dy[e] * unit.xhat[e];
    }
  }

  PerChannel<kRows> dy = PerChannel<kRows>::of(0);
  PerChannel<kRows> dy_xhat = PerChannel<kRows>::of(0);
};

// Writes the block's partial sums, formed by the whole block.
template <bool kRows>
SSP_DEVICE void write_partial(const Walk<kRows>& walk, const ThreadSums<kRows>& sums,
                              const SumScratch& scratch, SumPartial* partials) {
  SumPartial* own = partials + walk.part * walk.g.extent.c + walk.first_channel();
  const PerChannel<kRows> both[] = {sums.dy, sums.dy_xhat};
  block_sum(both, walk, scratch);
  const int columns = kRows ? walk.g.tile_channels : 1;
  for (int i = threadIdx.x; i < walk.columns(); i += blockDim.x) {
    own[i] = {static_cast<float>(scratch.totals[i]),
              static_cast<float>(scratch.totals[columns + i])};
  }
}

// Merges the partial sums of the tile's parts to tables, in which they stay; the first part also
// writes them out.
template <bool kRows>
SSP_DEVICE void merge_partials(const Walk<kRows>& walk, const GradientSums& sums,
                               const SumScratch& scratch, float* dy, float* dy_xhat) {
  const SumPartial* partials = sums.partials + walk.first_channel();
  const int columns = walk.columns();
  sum_columns<2>(walk.g.parts, columns, scratch, [&](int part, int column, double* totals) {
    const SumPartial own = partials[part * walk.g.extent.c + column];
    totals[0] += own.dy;
    totals[1] += own.dy_xhat;
  });
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    dy[i] = static_cast<float>(scratch.totals[i]);
    dy_xhat[i] = static_cast<float>(scratch.totals[columns + i]);
    if (walk.part != 0) continue;
    sums.dy[walk.first_channel() + i] = dy[i];
    sums.dy_xhat[walk.first_channel() + i] = dy_xhat[i];
  }
  __syncthreads();
}

}  // namespace ssp
