#pragma once

// The backward of normalization and activation, unit by unit.

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

  template <bool kRows>
  SSP_DEVICE void fill(const Walk<kRows>& walk, const NormGradient& gradient) const {
    AffineTables::fill(walk, gradient.gamma, gradient.beta);
    fill_table(walk, gradient.mean, 0, mean);
    fill_table(walk, gradient.rstd, 1, rstd);
  }

  float* mean_dy;
  float* mean_dy_xhat;
};

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

// du without the extras, with the statistics' share.
template <bool kRows>
SSP_DEVICE void own_gradient(const UnitGradient<kRows>& unit, const Affine<kRows>& affine,
                             const GradientTables& tables, int column, float (&du)[kUnit]) {
  const auto mean_dy = PerChannel<kRows>::of(tables.mean_dy, column);
  const auto mean_dy_xhat = PerChannel<kRows>::of(tables.mean_dy_xhat, column);
#pragma unroll
  for (int e = 0; e < kUnit; ++e) {
    du[e] = input_gradient(unit.dy[e], unit.xhat[e], affine.rstd[e], affine.gamma[e], mean_dy[e],
                           mean_dy_xhat[e]);
  }
}

// The same with fixed statistics.
template <bool kRows>
SSP_DEVICE void fixed_gradient(const float (&dy)[kUnit], const PerChannel<kRows>& rstd,
                               const PerChannel<kRows>& gamma, float (&du)[kUnit]) {
#pragma unroll
  for (int e = 0; e < kUnit; ++e) du[e] = input_gradient(dy[e], rstd[e], gamma[e]);
}

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
  block_sum(sums.dy, walk, scratch);
  for (int i = threadIdx.x; i < walk.columns(); i += blockDim.x) {
    own[i].dy = static_cast<float>(scratch.totals[i]);
  }
  block_sum(sums.dy_xhat, walk, scratch);
  for (int i = threadIdx.x; i < walk.columns(); i += blockDim.x) {
    own[i].dy_xhat = static_cast<float>(scratch.totals[i]);
  }
}

// Merges the partial sums of the tile's parts to tables, in which they stay; the first part also
// writes them out.
template <bool kRows>
SSP_DEVICE void merge_partials(const Walk<kRows>& walk, const GradientSums& sums,
                               const SumScratch& scratch, float* dy, float* dy_xhat) {
  const auto merge = [&](float SumPartial::* member, float* table, float* out) {
    const SumPartial* partials = sums.partials + walk.first_channel();
    const int columns = walk.columns();
    sum_columns(walk.g.parts, columns, scratch, [&](int part, int column) {
      return static_cast<double>(partials[part * walk.g.extent.c + column].*member);
    });
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
      table[i] = static_cast<float>(scratch.totals[i]);
      if (walk.part == 0) out[walk.first_channel() + i] = table[i];
    }
    __syncthreads();
  };
  merge(&SumPartial::dy, dy, sums.dy);
  merge(&SumPartial::dy_xhat, dy_xhat, sums.dy_xhat);
}

// Turns tables of sums into tables of the means of gamma dy and gamma dy xhat.
template <bool kRows>
SSP_DEVICE void scale_means(const Walk<kRows>& walk, const GradientTables& tables, double count) {
  for (int i = threadIdx.x; i < walk.g.tile_channels; i += blockDim.x) {
    tables.mean_dy[i] = static_cast<float>(tables.gamma[i] * (tables.mean_dy[i] / count));
    tables.mean_dy_xhat[i] = static_cast<float>(tables.gamma[i] * (tables.mean_dy_xhat[i] / count));
  }
  __syncthreads();
}

}  // namespace ssp
