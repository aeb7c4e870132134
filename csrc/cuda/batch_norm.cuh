#pragma once

#include "batch_norm.h"
#include "moments.cuh"
#include "normalize.cuh"
#include "on_chip.cuh"
#include "stage.cuh"

namespace ssp {

// One block a multiprocessor, with all its registers.
template <Access kAccess>
constexpr int kBatchNormThreads = kAccess == Access::kNarrow ? 512 : 384;
constexpr int kBatchNormMaxWidth = 4;  // narrow tiles have few partial moments to merge

// u is kept.
template <Access kAccess>
using BatchNormChip = OnChip<1, kAccess, 16 / RawUnit<kAccess>::kWords>;

// Tables over the tile's channels.
struct BatchNormTables {
  static constexpr int kTables = 2;

  SSP_DEVICE BatchNormTables(float* shared, int table)
      : mean(shared), rstd(mean + table), after(rstd + table) {}
  SSP_DEVICE float* end() const { return after; }

  float* mean;
  float* rstd;

 private:
  float* after;
};

template <bool kRows, int kTerms, Access kAccess>
__global__ void __launch_bounds__(kBatchNormThreads<kAccess>, 1)
    batch_norm_kernel(const BatchNormParams params, const Geometry geometry) {
  SSP_DYN_SHARED(float, shared);
  const Walk<kRows> walk(geometry);
  const BatchNormTables tables(shared, geometry.table());
  const SumScratch scratch(tables.end(), kRows, geometry.tile_channels);
  using StageUnits = Stage<kRows, kTerms, kAccess>;
  using Chip = BatchNormChip<kAccess>;
  using Kept = typename Chip::Kept;
  const ChannelLoad<kRows> bias(params.stage.channel_bias, walk);
  const ChannelLoad<kRows> gamma(params.gamma, walk);
  const ChannelLoad<kRows> beta(params.beta, walk);
  const StageUnits stage(params.stage, walk, bias);
  const Storage storage = params.stage.u.storage;
  Chip chip(scratch.end());
  auto sum = PerChannel<kRows>::of(0);
  chip.template fill<StageUnits::kBatch>(
      walk, [&](const Place& place) { return stage.sum.load(place.offset, place.length); },
      [&](const auto& raw, const Place& place, Kept& kept) {
        float u[kUnit];
        kept.tensor[0] = stage.produce(raw, place, u);
#pragma unroll
        for (int e = 0; e < kUnit; ++e) sum[e] += u[e];
      });
  block_sum(sum, walk, scratch);
  block_means(walk, scratch, tables.mean);

  const auto centre = PerChannel<kRows>::of(tables.mean, walk.column());
  auto squares = PerChannel<kRows>::of(0);
  chip.for_each(walk, [&](const Kept& kept, uint32_t) {
    float u[kUnit];
    unpack(kept.tensor[0], storage, u);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const float deviation = u[e] - centre[e];
      squares[e] += deviation * deviation;
    }
  });
  block_sum(squares, walk, scratch);
  write_partial(walk, scratch, tables.mean, params.statistics.partials);
  if (geometry.parts > 1) {
    SSP_GRID_SYNC();
  } else {
    __syncthreads();
  }
  merge_partials(walk, params.statistics, scratch, tables.mean, tables.rstd);

  const Affine<kRows> affine(PerChannel<kRows>::of(tables.mean, walk.column()),
                             PerChannel<kRows>::of(tables.rstd, walk.column()), gamma, beta);
  chip.for_each(walk, [&](const Kept& kept, uint32_t unit) {
    const Place place = place_of<kAccess>(walk, unit);
    float u[kUnit];
    float z[kUnit];
    unpack(kept.tensor[0], storage, u);
    affine.y(u, z);
    activate_unit(params.activation, z);
    store_unit(params.z, place.offset, place.length, pack<kAccess>(z, params.z.storage));
  });
}

inline Access batch_norm_access(const BatchNormParams& params, const Extent& extent) {
  const StageParams& stage = params.stage;
  return access_of(extent, addresses(stage.sum) | address(stage.u.data) | address(params.z.data),
                   is_narrow(stage.sum) && is_narrow(params.z));
}

// Calls f<kRows, kTerms, kAccess>() where all units are aligned.
template <class F>
auto with_batch_norm_variant(const BatchNormParams& params, const Extent& extent, const F& f) {
  return with_stage_variant(extent.rows, params.stage.sum.count, batch_norm_access(params, extent),
                            [&]<bool kRows, int kTerms, Access kAccess>() {
                              if constexpr (kAccess != Access::kAny) {
                                return f.template operator()<kRows, kTerms, kAccess>();
                              } else {
                                return decltype(f.template operator()<kRows, 1, Access::kWide>())();
                              }
                            });
}

inline OnChipPlan plan_batch_norm_on(const BatchNormParams& params, const Extent& extent,
                                     const Device& device) {
  const auto base_bytes = [](const Geometry& g) {
    return BatchNormTables::kTables * sizeof(float) * g.table() +
           SumScratch::bytes(g.extent.rows, g.threads, g.tile_channels);
  };
  return with_batch_norm_variant(params, extent, [&]<bool kRows, int kTerms, Access kAccess>() {
    return plan_on_chip<BatchNormChip<kAccess>>(
        extent, kBatchNormMaxWidth, kBatchNormThreads<kAccess>, device, base_bytes,
        [](size_t shared) {
          return SSP_BLOCKS_PER_MULTIPROCESSOR((batch_norm_kernel<kRows, kTerms, kAccess>),
                                               kBatchNormThreads<kAccess>, shared);
        });
  });
}

inline void run_batch_norm(const BatchNormParams& params, const OnChipPlan& plan,
                           cudaStream_t stream) {
  const Geometry& g = plan.geometry;
  with_batch_norm_variant(params, g.extent, [&]<bool kRows, int kTerms, Access kAccess>() {
    if (g.parts > 1) {
      SSP_LAUNCH_COOPERATIVE((batch_norm_kernel<kRows, kTerms, kAccess>), dim3(g.blocks()),
                             dim3(g.threads), plan.shared, stream, params, g);
    } else {
      SSP_LAUNCH((batch_norm_kernel<kRows, kTerms, kAccess>), dim3(g.blocks()), dim3(g.threads),
                 plan.shared, stream, params, g);
    }
  });
}

}  // namespace ssp
