#pragma once

#include "moments.cuh"
#include "normalize.cuh"
#include "stage.cuh"
#include "stage_norm_act.h"

namespace ssp {

constexpr int kNormActMaxWidth = 32;  // units of a row that a block works on
constexpr int kNormActBatch = 2;      // units of a thread, at least, of a tensor that has enough

template <bool kRows, int kTerms, Access kAccess>
__global__ void __launch_bounds__(kStageThreads, kStageBlocks<kAccess>)
    stage_norm_act_kernel(const StageNormActParams params, const Geometry geometry) {
  const Walk<kRows> walk(geometry);
  const ChannelLoad<kRows> bias(params.stage.channel_bias, walk);
  if (params.z.data == nullptr) {
    const Stage<kRows, kTerms, kAccess> stage(params.stage, walk, bias);
    for_each_stage_unit(walk, stage, [](const Place&, const float (&)[kUnit]) {});
    return;
  }
  Affine<kRows> affine = affine_of(walk, params.mean, params.rstd, params.gamma, params.beta);
  if (params.batch.partials != nullptr) {
    SSP_DYN_SHARED(float, shared);
    float* rstds = shared + geometry.table();
    const SumScratch scratch(rstds + geometry.table(), kRows, geometry.tile_channels);
    merge_partials(walk, params.batch, scratch, shared, rstds);
    affine.mean = PerChannel<kRows>::of(shared, walk.column());
    affine.rstd = PerChannel<kRows>::of(rstds, walk.column());
  }
  const Stage<kRows, kTerms, kAccess> stage(params.stage, walk, bias);
  for_each_stage_unit(walk, stage, [&](const Place& place, const float (&u)[kUnit]) {
    float z[kUnit];
    affine.y(u, z);
    if (params.mask != nullptr) params.mask[place.mask_byte] = mask_bits(z, place.length);
    activate_unit(params.activation, z);
    store_unit(params.z, place.offset, place.length, pack<kAccess>(z, params.z.storage));
  });
}

inline void run_stage_norm_act(const StageNormActParams& params, const Device& device,
                               cudaStream_t stream) {
  const Extent& extent = params.extent;
  const bool merges = params.batch.partials != nullptr;
  const Geometry geometry =
      merges ? params.batch_geometry
             : channel_geometry(extent, kNormActMaxWidth, kStageThreads,
                                streaming_blocks(kLeastStageBlocks, device), kNormActBatch);
  const Access access = access_of(
      extent, addresses(params.stage.sum) | address(params.stage.u.data) | address(params.z.data),
      is_narrow(params.stage.sum) && is_narrow(params.z));
  const size_t shared = merges ? merging_shared(geometry) : 0;
  with_stage_variant(
      extent.rows, params.stage.sum.count, access, [&]<bool kRows, int kTerms, Access kAccess>() {
        SSP_LAUNCH((stage_norm_act_kernel<kRows, kTerms, kAccess>), dim3(geometry.blocks()),
                   dim3(geometry.threads), shared, stream, params, geometry);
      });
}

}  // namespace ssp
