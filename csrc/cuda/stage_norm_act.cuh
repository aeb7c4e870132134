#pragma once

#include "moments.cuh"
#include "normalize.cuh"
#include "stage.cuh"
#include "stage_norm_act.h"

namespace ssp {

constexpr int kNormActThreads = 256;
constexpr int kNormActBlocks = 2;     // a multiprocessor
constexpr int kNormActMaxWidth = 32;  // units of a row that a block works on

template <bool kRows, int kTerms, bool kAligned>
__global__ void __launch_bounds__(kNormActThreads, kNormActBlocks)
    stage_norm_act_kernel(const StageNormActParams params, const Geometry geometry) {
  SSP_DYN_SHARED(float, shared);
  const Walk<kRows> walk(geometry);
  const AffineTables tables(shared, geometry.table());
  float* biases = tables.end();
  if (params.z.data != nullptr) {
    tables.fill(walk, params.gamma, params.beta);
    if (params.batch.partials != nullptr) {
      const SumScratch scratch(biases + geometry.table(), kRows, geometry.tile_channels);
      merge_partials(walk, params.batch, scratch, tables.mean, tables.rstd);
    } else {
      fill_table(walk, params.mean, 0, tables.mean);
      fill_table(walk, params.rstd, 1, tables.rstd);
    }
  }
  const bool biased = params.stage.channel_bias.data != nullptr;
  if (biased) fill_table(walk, params.stage.channel_bias, 0, biases);
  __syncthreads();

  const Stage<kRows, kTerms, kAligned> stage(params.stage, biased ? biases : nullptr);
  if (params.z.data == nullptr) {
    for_each_stage_unit(walk, stage, [](const Place&, const float (&)[kUnit]) {});
    return;
  }
  for_each_stage_unit(walk, stage, [&](const Place& place, const float (&u)[kUnit]) {
    const Affine<kRows> affine(tables, place.column);
    float z[kUnit];
    affine.y(u, z);
    if (params.mask != nullptr) params.mask[place.mask_byte] = mask_bits(z, place.length);
    activate_unit(params.activation, z);
    store_unit<kAligned>(params.z, place.offset, place.length, pack(z, params.z.storage));
  });
}

inline void run_stage_norm_act(const StageNormActParams& params, const Device& device,
                               cudaStream_t stream) {
  const Extent& extent = params.extent;
  const bool merges = params.batch.partials != nullptr;
  const Geometry geometry =
      merges ? params.batch_geometry
             : channel_geometry(extent, kNormActMaxWidth, kNormActThreads,
                                streaming_blocks(extent, kNormActBlocks, device));
  const bool aligned = is_aligned(
      extent, addresses(params.stage.sum) | address(params.stage.u.data) | address(params.z.data));
  const size_t shared =
      (AffineTables::kTables + 1) * sizeof(float) * geometry.table() +
      (merges ? SumScratch::bytes(extent.rows, geometry.threads, geometry.tile_channels) : 0);
  with_stage_variant(
      extent.rows, params.stage.sum.count, aligned, [&]<bool kRows, int kTerms, bool kAligned>() {
        SSP_LAUNCH((stage_norm_act_kernel<kRows, kTerms, kAligned>), dim3(geometry.blocks()),
                   dim3(geometry.threads), shared, stream, params, geometry);
      });
}

}  // namespace ssp
