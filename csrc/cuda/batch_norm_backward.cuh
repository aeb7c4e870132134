#pragma once

#include "batch_norm_backward.h"
#include "gradient.cuh"
#include "on_chip.cuh"

namespace ssp {

constexpr int kBatchNormBackwardThreads = 384;  // one block a multiprocessor
constexpr int kBatchNormBackwardMaxWidth = 4;   // narrow tiles have few partial sums to merge
constexpr int kBatchNormBackwardBatch = 2;      // units whose loads a thread has in flight

// dz and u are kept; kWords words hold a unit of the wider one.
template <int kWords>
using BatchNormBackwardChip = OnChip<2, kWords, kBatchNormBackwardBatch>;

template <bool kRows, int kWords>
__global__ void __launch_bounds__(kBatchNormBackwardThreads, 1)
    batch_norm_backward_kernel(const BatchNormBackwardParams params, const Geometry geometry) {
  struct Raw {
    RawUnit dz;
    RawUnit u;
  };
  SSP_DYN_SHARED(float, shared);
  const NormGradient& gradient = params.gradient;
  const Walk<kRows> walk(geometry);
  const GradientTables tables(shared, geometry.table());
  const SumScratch scratch(tables.end(), kRows, geometry.tile_channels);
  tables.fill(walk, gradient);
  __syncthreads();

  using Chip = BatchNormBackwardChip<kWords>;
  using Kept = typename Chip::Kept;
  const int column = kRows ? static_cast<int>(threadIdx.x % geometry.width.divisor) * kUnit : 0;
  const float scale = scale_of(gradient);
  const auto unit_gradient = [&](const Kept& kept) {
    float dz[kUnit];
    float u[kUnit];
    kept.tensor[0].get(gradient.dz.storage, dz);
    kept.tensor[1].get(gradient.u.storage, u);
    return UnitGradient<kRows>(Affine<kRows>(tables, column), gradient.activation, scale, dz, u);
  };

  Chip chip(scratch.end());
  ThreadSums<kRows> sums;
  chip.template fill<kBatchNormBackwardBatch>(
      walk,
      [&](const Place& place) {
        return Raw{load_unit<true>(gradient.dz, place.offset, place.length),
                   load_unit<true>(gradient.u, place.offset, place.length)};
      },
      [&](const Raw& raw, const Place& place, Kept& kept) {
        kept.tensor[0].set(raw.dz);
        kept.tensor[1].set(raw.u);
        UnitGradient<kRows> own = unit_gradient(kept);
        sums.add(own, place.length);
        if (params.z.data == nullptr) return;
        activate_unit(gradient.activation, own.y);
        store_unit<true>(params.z, place.offset, place.length, pack(own.y, params.z.storage));
      });
  write_partial(walk, sums, scratch, params.sums.partials);
  if (geometry.parts > 1) {
    SSP_GRID_SYNC();
  } else {
    __syncthreads();
  }
  merge_partials(walk, params.sums, scratch, tables.mean_dy, tables.mean_dy_xhat);
  scale_means(walk, tables, static_cast<double>(geometry.extent.per_channel()));

  const Terms<0, true> extras(params.extras);
  chip.for_each(walk, [&](const Kept& kept, uint32_t unit) {
    const Place place = walk.at(unit);
    const auto raw_extras = extras.load(place.offset, place.length);
    float du[kUnit];
    own_gradient(unit_gradient(kept), Affine<kRows>(tables, column), tables, column, du);
    extras.add(raw_extras, du);
    store_unit<true>(params.du, place.offset, place.length, pack(du, params.du.storage));
  });
}

// Calls f<kRows, kWords>().
template <class F>
auto with_batch_norm_backward_variant(const NormGradient& gradient, bool rows, const F& f) {
  const bool narrow =
      gradient.dz.storage != Storage::kFloat && gradient.u.storage != Storage::kFloat;
  if (rows) {
    return narrow ? f.template operator()<true, 4>() : f.template operator()<true, 8>();
  }
  return narrow ? f.template operator()<false, 4>() : f.template operator()<false, 8>();
}

inline OnChipPlan plan_batch_norm_backward_on(const BatchNormBackwardParams& params,
                                              const Extent& extent, const Device& device) {
  const uintptr_t bits = addresses(params.extras) | address(params.gradient.dz.data) |
                         address(params.gradient.u.data) | address(params.z.data) |
                         address(params.du.data);
  if (!is_aligned(extent, bits)) return {};
  const auto base_bytes = [](const Geometry& g) {
    return GradientTables::kTables * sizeof(float) * g.table() +
           SumScratch::bytes(g.extent.rows, g.threads, g.tile_channels);
  };
  return with_batch_norm_backward_variant(
      params.gradient, extent.rows, [&]<bool kRows, int kWords>() {
        return plan_on_chip<BatchNormBackwardChip<kWords>>(
            extent, kBatchNormBackwardMaxWidth, kBatchNormBackwardThreads, device, base_bytes,
            [](size_t shared) {
              return SSP_BLOCKS_PER_MULTIPROCESSOR((batch_norm_backward_kernel<kRows, kWords>),
                                                   kBatchNormBackwardThreads, shared);
            });
      });
}

inline void run_batch_norm_backward(const BatchNormBackwardParams& params, const OnChipPlan& plan,
                                    cudaStream_t stream) {
  const Geometry& g = plan.geometry;
  with_batch_norm_backward_variant(params.gradient, g.extent.rows, [&]<bool kRows, int kWords>() {
    if (g.parts > 1) {
      SSP_LAUNCH_COOPERATIVE((batch_norm_backward_kernel<kRows, kWords>), dim3(g.blocks()),
                             dim3(g.threads), plan.shared, stream, params, g);
    } else {
      SSP_LAUNCH((batch_norm_backward_kernel<kRows, kWords>), dim3(g.blocks()), dim3(g.threads),
                 plan.shared, stream, params, g);
    }
  });
}

}  // namespace ssp
