#pragma once

#include "batch_norm_backward.h"
#include "gradient.cuh"
#include "on_chip.cuh"

namespace ssp {

// One block a multiprocessor, with all its registers.
template <Access kAccess, bool kFew>
constexpr int kBatchNormBackwardThreads = kAccess == Access::kNarrow && kFew ? 512 : 384;
constexpr int kBatchNormBackwardMaxWidth = 4;  // narrow tiles have few partial sums to merge
constexpr int kBatchNormBackwardBatch = 2;     // units whose loads a thread has in flight

// dz and u are kept.
template <Access kAccess>
using BatchNormBackwardChip = OnChip<2, kAccess, kBatchNormBackwardBatch>;

// kFew: there is one extra at most.
template <bool kRows, Access kAccess, bool kFew>
__global__ void __launch_bounds__(kBatchNormBackwardThreads<kAccess, kFew>, 1)
    batch_norm_backward_kernel(const BatchNormBackwardParams params, const Geometry geometry) {
  using Chip = BatchNormBackwardChip<kAccess>;
  using Kept = typename Chip::Kept;
  SSP_DYN_SHARED(float, shared);
  const NormGradient& gradient = params.gradient;
  const Walk<kRows> walk(geometry);
  float* dy_xhat = shared + geometry.table();
  const SumScratch scratch(dy_xhat + geometry.table(), kRows, geometry.tile_channels);
  const Affine<kRows> affine = affine_of(walk, gradient);
  const float scale = scale_of(gradient);
  const auto unit_gradient = [&](const Kept& kept) {
    float dz[kUnit];
    float u[kUnit];
    unpack(kept.tensor[0], gradient.dz.storage, dz);
    unpack(kept.tensor[1], gradient.u.storage, u);
    return UnitGradient<kRows>(affine, gradient.activation, scale, dz, u);
  };

  Chip chip(scratch.end());
  ThreadSums<kRows> sums;
  chip.template fill<kBatchNormBackwardBatch>(
      walk,
      [&](const Place& place) {
        return Kept{load_unit<kAccess>(gradient.dz, place.offset, place.length),
                    load_unit<kAccess>(gradient.u, place.offset, place.length)};
      },
      [&](const Kept& raw, const Place& place, Kept& kept) {
        kept = raw;
        UnitGradient<kRows> own = unit_gradient(kept);
        sums.add(own, place.length);
        if (params.z.data == nullptr) return;
        activate_unit(gradient.activation, own.y);
        store_unit(params.z, place.offset, place.length, pack<kAccess>(own.y, params.z.storage));
      });
  write_partial(walk, sums, scratch, params.sums.partials);
  if (geometry.parts > 1) {
    SSP_GRID_SYNC();
  } else {
    __syncthreads();
  }
  merge_partials(walk, params.sums, scratch, shared, dy_xhat);
  GradientMeans<kRows> means;
  means.dy = PerChannel<kRows>::of(shared, walk.column());
  means.dy_xhat = PerChannel<kRows>::of(dy_xhat, walk.column());
  means.scale(affine.gamma, static_cast<double>(geometry.extent.per_channel()));

  const Extras<kAccess, kFew> extras(params.extras);
  chip.for_each(
      walk, [&](const Place& place) { return extras.load(place); },
      [&](const Kept& kept, const Place& place, const auto& raw_extras) {
        float du[kUnit];
        own_gradient(unit_gradient(kept), affine, means, du);
        extras.add(raw_extras, place, du);
        store_unit(params.du, place.offset, place.length, pack<kAccess>(du, params.du.storage));
      });
}

// Calls f<kRows, kAccess, kFew>() where all units are aligned.
template <class F>
auto with_batch_norm_backward_variant(const BatchNormBackwardParams& params, const Extent& extent,
                                      const F& f) {
  const NormGradient& gradient = params.gradient;
  const Access access =
      access_of(extent,
                addresses(params.extras) | address(gradient.dz.data) | address(gradient.u.data) |
                    address(params.z.data) | address(params.du.data),
                is_narrow(params.extras) && is_narrow(gradient.dz) && is_narrow(gradient.u) &&
                    is_narrow(params.z) && is_narrow(params.du));
  return with_layout_variant(extent.rows, access, [&]<bool kRows, Access kAccess>() {
    if constexpr (kAccess != Access::kAny) {
      return params.extras.count <= 1 ? f.template operator()<kRows, kAccess, true>()
                                      : f.template operator()<kRows, kAccess, false>();
    } else {
      return decltype(f.template operator()<kRows, Access::kWide, true>())();
    }
  });
}

inline OnChipPlan plan_batch_norm_backward_on(const BatchNormBackwardParams& params,
                                              const Extent& extent, const Device& device) {
  return with_batch_norm_backward_variant(
      params, extent, [&]<bool kRows, Access kAccess, bool kFew>() {
        return plan_on_chip<BatchNormBackwardChip<kAccess>>(
            extent, kBatchNormBackwardMaxWidth, kBatchNormBackwardThreads<kAccess, kFew>, device,
            merging_shared, [](size_t shared) {
              return SSP_BLOCKS_PER_MULTIPROCESSOR(
                  (batch_norm_backward_kernel<kRows, kAccess, kFew>),
                  (kBatchNormBackwardThreads<kAccess, kFew>), shared);
            });
      });
}

inline void run_batch_norm_backward(const BatchNormBackwardParams& params, const OnChipPlan& plan,
                                    cudaStream_t stream) {
  const Geometry& g = plan.geometry;
  with_batch_norm_backward_variant(params, g.extent, [&]<bool kRows, Access kAccess, bool kFew>() {
    if (g.parts > 1) {
      SSP_LAUNCH_COOPERATIVE((batch_norm_backward_kernel<kRows, kAccess, kFew>), dim3(g.blocks()),
                             dim3(g.threads), plan.shared, stream, params, g);
    } else {
      SSP_LAUNCH((batch_norm_backward_kernel<kRows, kAccess, kFew>), dim3(g.blocks()),
                 dim3(g.threads), plan.shared, stream, params, g);
    }
  });
}

}  // namespace ssp
