#pragma once

#include "batch_norm.h"
#include "moments.cuh"
#include "normalize.cuh"
#include "on_chip.cuh"
#include "stage.cuh"

namespace ssp {

constexpr int kBatchNormThreads = 384;  // one block a multiprocessor, with all its registers
constexpr int kBatchNormMaxWidth = 4;   // narrow tiles have few partial moments to merge

// u is kept; kWords words hold a unit of it.
template <int kWords>
using BatchNormChip = OnChip<1, kWords, 16 / kWords>;

template <bool kRows, int kTerms, int kWords>
__global__ void __launch_bounds__(kBatchNormThreads, 1)
    batch_norm_kernel(const BatchNormParams params, const Geometry geometry) {
  SSP_DYN_SHARED(float, shared);
  const Walk<kRows> walk(geometry);
  const AffineTables tables(shared, geometry.table());
  float* biases = tables.end();
  const SumScratch scratch(biases + geometry.table(), kRows, geometry.tile_channels);
  tables.fill(walk, params.gamma, params.beta);
  const bool biased = params.stage.channel_bias.data != nullptr;
  if (biased) fill_table(walk, params.stage.channel_bias, 0, biases);
  __syncthreads();

  using StageUnits = Stage<kRows, kTerms, true>;
  using Chip = BatchNormChip<kWords>;
  using Kept = typename Chip::Kept;
  const StageUnits stage(params.stage, biased ? biases : nullptr);
  const Storage storage = params.stage.u.storage;
  Chip chip(scratch.end());
  auto sum = PerChannel<kRows>::of(0);
  chip.template fill<StageUnits::kBatch>(
      walk, [&](const Place& place) { return stage.sum.load(place.offset, place.length); },
      [&](const auto& raw, const Place& place, Kept& kept) {
        float u[kUnit];
        kept.tensor[0].set(stage.produce(raw, place, u));
#pragma unroll
        for (int e = 0; e < kUnit; ++e) sum[e] += u[e];
      });
  block_sum(sum, walk, scratch);
  block_means(walk, scratch, tables.mean);

  const int column = kRows ? static_cast<int>(threadIdx.x % geometry.width.divisor) * kUnit : 0;
  const auto centre = PerChannel<kRows>::of(tables.mean, column);
  auto squares = PerChannel<kRows>::of(0);
  chip.for_each(walk, [&](const Kept& kept, uint32_t) {
    float u[kUnit];
    kept.tensor[0].get(storage, u);
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

  const Affine<kRows> affine(tables, column);
  chip.for_each(walk, [&](const Kept& kept, uint32_t unit) {
    const Place place = walk.at(unit);
    float u[kUnit];
    float z[kUnit];
    kept.tensor[0].get(storage, u);
    affine.y(u, z);
    activate_unit(params.activation, z);
    store_unit<true>(params.z, place.offset, place.length, pack(z, params.z.storage));
  });
}

// Calls f<kRows, kTerms, kWords>().
template <class F>
auto with_batch_norm_variant(const BatchNormParams& params, bool rows, const F& f) {
  const bool narrow = params.stage.u.storage != Storage::kFloat;
  const auto with_rows = [&]<bool kRows, int kWords>() {
    switch (params.stage.sum.count) {
      case 1:
        return f.template operator()<kRows, 1, kWords>();
      case 2:
        return f.template operator()<kRows, 2, kWords>();
      case 3:
        return f.template operator()<kRows, 3, kWords>();
      default:
        return f.template operator()<kRows, 0, kWords>();
    }
  };
  if (rows) {
    return narrow ? with_rows.template operator()<true, 4>()
                  : with_rows.template operator()<true, 8>();
  }
  return narrow ? with_rows.template operator()<false, 4>()
                : with_rows.template operator()<false, 8>();
}

inline OnChipPlan plan_batch_norm_on(const BatchNormParams& params, const Extent& extent,
                                     const Device& device) {
  const uintptr_t bits =
      addresses(params.stage.sum) | address(params.stage.u.data) | address(params.z.data);
  if (!is_aligned(extent, bits)) return {};
  const auto base_bytes = [](const Geometry& g) {
    return (AffineTables::kTables + 1) * sizeof(float) * g.table() +
           SumScratch::bytes(g.extent.rows, g.threads, g.tile_channels);
  };
  return with_batch_norm_variant(params, extent.rows, [&]<bool kRows, int kTerms, int kWords>() {
    return plan_on_chip<BatchNormChip<kWords>>(
        extent, kBatchNormMaxWidth, kBatchNormThreads, device, base_bytes, [](size_t shared) {
          return SSP_BLOCKS_PER_MULTIPROCESSOR((batch_norm_kernel<kRows, kTerms, kWords>),
                                               kBatchNormThreads, shared);
        });
  });
}

inline void run_batch_norm(const BatchNormParams& params, const OnChipPlan& plan,
                           cudaStream_t stream) {
  const Geometry& g = plan.geometry;
  with_batch_norm_variant(params, g.extent.rows, [&]<bool kRows, int kTerms, int kWords>() {
    if (g.parts > 1) {
      SSP_LAUNCH_COOPERATIVE((batch_norm_kernel<kRows, kTerms, kWords>), dim3(g.blocks()),
                             dim3(g.threads), plan.shared, stream, params, g);
    } else {
      SSP_LAUNCH((batch_norm_kernel<kRows, kTerms, kWords>), dim3(g.blocks()), dim3(g.threads),
                 plan.shared, stream, params, g);
    }
  });
}

}  // namespace ssp
