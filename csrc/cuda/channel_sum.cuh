#pragma once

#include "block_sum.cuh"
#include "channel_sum.h"
#include "stage.cuh"

namespace ssp {

constexpr int kChannelSumThreads = 256;
constexpr int kChannelSumBlocks = 4;  // a multiprocessor
constexpr int kChannelSumMaxWidth = 4;
constexpr int kChannelSumBatch = 4;  // units whose loads a thread has in flight

inline Geometry channel_sum_geometry_on(const Extent& extent, const Device& device) {
  return channel_geometry(extent, kChannelSumMaxWidth, kChannelSumThreads,
                          summing_blocks(extent, kChannelSumBlocks, device), kChannelSumBatch);
}

template <bool kRows, Access kAccess>
__global__ void __launch_bounds__(kChannelSumThreads, kChannelSumBlocks)
    channel_sum_kernel(const ChannelSumParams params) {
  SSP_DYN_SHARED(float, shared);
  const Geometry& geometry = params.geometry;
  const Walk<kRows> walk(geometry);
  const SumScratch scratch(shared, kRows, geometry.tile_channels);
  const uint32_t step = geometry.active;
  auto sum = PerChannel<kRows>::of(0);
  for (uint32_t unit = walk.begin; unit < walk.end; unit += kChannelSumBatch * step) {
    RawUnit<kAccess> raw[kChannelSumBatch];
#pragma unroll
    for (int i = 0; i < kChannelSumBatch; ++i) {
      if (unit + i * step >= walk.end) continue;
      const Place place = place_of<kAccess>(walk, unit + i * step);
      raw[i] = load_unit<kAccess>(params.g, place.offset, place.length);
    }
#pragma unroll
    for (int i = 0; i < kChannelSumBatch; ++i) {
      if (unit + i * step >= walk.end) continue;
      float g[kUnit];
      unpack(raw[i], params.g.storage, g);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) sum[e] += g[e];
    }
  }
  block_sum(sum, walk, scratch);
  for (int i = threadIdx.x; i < walk.columns(); i += blockDim.x) {
    params.partials[walk.part * geometry.extent.c + walk.first_channel() + i] =
        static_cast<float>(scratch.totals[i]);
  }
}

inline void run_channel_sum(const ChannelSumParams& params, cudaStream_t stream) {
  const Geometry& g = params.geometry;
  with_layout_variant(
      g.extent.rows, access_of(g.extent, address(params.g.data), is_narrow(params.g)),
      [&]<bool kRows, Access kAccess>() {
        SSP_LAUNCH((channel_sum_kernel<kRows, kAccess>), dim3(g.blocks()), dim3(g.threads),
                   SumScratch::bytes(kRows, g.threads, g.tile_channels), stream, params);
      });
}

}  // namespace ssp
