#pragma once

#include "moments.cuh"
#include "stage.cuh"
#include "stage_moments.h"

namespace ssp {

constexpr int kMomentsMaxWidth = 4;  // narrow tiles have few partial moments to merge
constexpr int kMomentsBatch = 2;     // units of a thread, at least, of a tensor that has enough

inline Geometry stage_moments_geometry_on(const Extent& extent, const Device& device) {
  return channel_geometry(extent, kMomentsMaxWidth, kStageThreads,
                          summing_blocks(extent, kLeastStageBlocks, device), kMomentsBatch);
}

template <bool kRows, int kTerms, Access kAccess>
__global__ void __launch_bounds__(kStageThreads, kStageBlocks<kAccess>)
    stage_moments_kernel(const StageMomentsParams params) {
  SSP_DYN_SHARED(float, shared);
  const Geometry& geometry = params.geometry;
  const Walk<kRows> walk(geometry);
  float* means = shared;
  const SumScratch scratch(means + geometry.table(), kRows, geometry.tile_channels);
  const Stage<kRows, kTerms, kAccess> stage(params.stage, walk,
                                            ChannelLoad<kRows>(params.stage.channel_bias, walk));
  ThreadMoments<kRows> moments;
  for_each_stage_unit(walk, stage, [&](const Place& place, const float (&u)[kUnit]) {
    moments.add(u, place.length);
  });

  block_sum(moments.sum, walk, scratch);
  block_means(walk, scratch, means);
  const auto centre = PerChannel<kRows>::of(means, walk.column());
  block_sum(moments.squares_about(centre), walk, scratch);
  write_partial(walk, scratch, means, params.statistics.partials);
}

template <bool kRows>
__global__ void __launch_bounds__(kStageThreads)
    merge_moments_kernel(const StageMomentsParams params) {
  SSP_DYN_SHARED(float, shared);
  const Geometry& geometry = params.geometry;
  const Walk<kRows> walk(geometry);
  float* rstds = shared + geometry.table();
  const SumScratch scratch(rstds + geometry.table(), kRows, geometry.tile_channels);
  merge_partials(walk, params.statistics, scratch, shared, rstds);
}

inline void run_stage_moments_partials(const StageMomentsParams& params, cudaStream_t stream) {
  const Geometry& g = params.geometry;
  const Access access =
      access_of(g.extent, addresses(params.stage.sum) | address(params.stage.u.data),
                is_narrow(params.stage.sum));
  with_stage_variant(g.extent.rows, params.stage.sum.count, access,
                     [&]<bool kRows, int kTerms, Access kAccess>() {
                       SSP_LAUNCH((stage_moments_kernel<kRows, kTerms, kAccess>), dim3(g.blocks()),
                                  dim3(g.threads), merging_shared(g), stream, params);
                     });
}

inline void run_stage_moments(const StageMomentsParams& params, cudaStream_t stream) {
  run_stage_moments_partials(params, stream);
  const Geometry& g = params.geometry;
  // The first part of every tile: its blocks are the grid's first.
  const dim3 grid(g.tiles);
  if (g.extent.rows) {
    SSP_LAUNCH((merge_moments_kernel<true>), grid, dim3(g.threads), merging_shared(g), stream,
               params);
  } else {
    SSP_LAUNCH((merge_moments_kernel<false>), grid, dim3(g.threads), merging_shared(g), stream,
               params);
  }
}

}  // namespace ssp
