#pragma once

#include "gradient.cuh"

namespace ssp {

constexpr int kBackwardThreads = 192;
constexpr int kBackwardBlocks = 2;  // a multiprocessor
constexpr int kReduceMaxWidth = 4;  // narrow tiles have few partial sums to merge
constexpr int kBackwardMaxWidth = 32;

inline Geometry norm_reduce_geometry_on(const Extent& extent, const Device& device) {
  return channel_geometry(extent, kReduceMaxWidth, kBackwardThreads,
                          streaming_blocks(extent, kBackwardBlocks, device));
}

inline Geometry norm_backward_geometry_on(const Extent& extent, const Device& device) {
  return channel_geometry(extent, kBackwardMaxWidth, kBackwardThreads,
                          streaming_blocks(extent, kBackwardBlocks, device));
}

inline size_t gradient_shared(const Geometry& g) {
  return GradientTables::kTables * sizeof(float) * g.table() +
         SumScratch::bytes(g.extent.rows, g.threads, g.tile_channels);
}

template <bool kRows, bool kAligned>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks)
    norm_reduce_kernel(const NormReduceParams params) {
  constexpr int kBatch = 2;
  SSP_DYN_SHARED(float, shared);
  const Geometry& geometry = params.geometry;
  const NormGradient& gradient = params.gradient;
  const Walk<kRows> walk(geometry);
  const GradientTables tables(shared, geometry.table());
  const SumScratch scratch(tables.end(), kRows, geometry.tile_channels);
  tables.fill(walk, gradient);
  __syncthreads();

  const float scale = scale_of(gradient);
  const uint32_t step = geometry.active;
  ThreadSums<kRows> sums;
  for (uint32_t unit = walk.begin; unit < walk.end; unit += kBatch * step) {
    RawUnit raw_dz[kBatch];
    RawUnit raw_u[kBatch];
    Place places[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (unit + i * step >= walk.end) continue;
      places[i] = walk.at(unit + i * step);
      raw_dz[i] = load_unit<kAligned>(gradient.dz, places[i].offset, places[i].length);
      raw_u[i] = load_unit<kAligned>(gradient.u, places[i].offset, places[i].length);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const Place& place = places[i];
      if (unit + i * step >= walk.end) continue;
      float dz[kUnit];
      float u[kUnit];
      unpack(raw_dz[i], gradient.dz.storage, dz);
      unpack(raw_u[i], gradient.u.storage, u);
      const Affine<kRows> affine(tables, place.column);
      UnitGradient<kRows> own(affine, gradient.activation, scale, dz, u);
      sums.add(own, place.length);
      if (params.z.data == nullptr) continue;
      activate_unit(gradient.activation, own.y);
      store_unit<kAligned>(params.z, place.offset, place.length, pack(own.y, params.z.storage));
    }
  }
  write_partial(walk, sums, scratch, params.sums.partials);
}

template <bool kRows>
__global__ void __launch_bounds__(kBackwardThreads)
    merge_sums_kernel(const NormReduceParams params) {
  SSP_DYN_SHARED(float, shared);
  const Walk<kRows> walk(params.geometry);
  const GradientTables tables(shared, params.geometry.table());
  const SumScratch scratch(tables.end(), kRows, params.geometry.tile_channels);
  merge_partials(walk, params.sums, scratch, tables.mean_dy, tables.mean_dy_xhat);
}

template <bool kRows, bool kAligned>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks)
    norm_backward_kernel(const NormBackwardParams params) {
  SSP_DYN_SHARED(float, shared);
  const Geometry& geometry = params.geometry;
  const NormGradient& gradient = params.gradient;
  const Walk<kRows> walk(geometry);
  const GradientTables tables(shared, geometry.table());
  tables.fill(walk, gradient);
  const bool merges = params.sums.partials != nullptr;
  const bool subtracts = merges || params.sum_dy.data != nullptr;
  if (merges) {
    const SumScratch scratch(tables.end(), kRows, geometry.tile_channels);
    merge_partials(walk, params.sums, scratch, tables.mean_dy, tables.mean_dy_xhat);
  } else if (subtracts) {
    fill_table(walk, params.sum_dy, 0, tables.mean_dy);
    fill_table(walk, params.sum_dy_xhat, 0, tables.mean_dy_xhat);
  }
  __syncthreads();
  if (subtracts) {
    const bool counted = params.count_tensor.data != nullptr;
    scale_means(walk, tables, counted ? value_at(params.count_tensor, 0) : params.count);
  }

  const Terms<0, kAligned> extras(params.extras);
  const float scale = scale_of(gradient);
  for (uint32_t unit = walk.begin; unit < walk.end; unit += geometry.active) {
    const Place place = walk.at(unit);
    const RawUnit raw_dz = load_unit<kAligned>(gradient.dz, place.offset, place.length);
    const auto raw_extras = extras.load(place.offset, place.length);
    float dz[kUnit];
    float du[kUnit];
    if (gradient.u.data != nullptr) {
      const RawUnit raw_u = load_unit<kAligned>(gradient.u, place.offset, place.length);
      float u[kUnit];
      unpack(raw_dz, gradient.dz.storage, dz);
      unpack(raw_u, gradient.u.storage, u);
      const Affine<kRows> affine(tables, place.column);
      const UnitGradient<kRows> own(affine, gradient.activation, scale, dz, u);
      if (subtracts) {
        own_gradient(own, affine, tables, place.column, du);
      } else {
        fixed_gradient(own.dy, affine.rstd, affine.gamma, du);
      }
    } else {
      const uint32_t bits = params.mask == nullptr ? 0xffu : params.mask[place.mask_byte];
      unpack(raw_dz, gradient.dz.storage, dz);
      float dy[kUnit];
      masked_unit(gradient.activation, scale, dz, bits, dy);
      fixed_gradient(dy, PerChannel<kRows>::of(tables.rstd, place.column),
                     PerChannel<kRows>::of(tables.gamma, place.column), du);
    }
    extras.add(raw_extras, du);
    store_unit<kAligned>(params.du, place.offset, place.length, pack(du, params.du.storage));
  }
}

inline void run_norm_reduce_partials(const NormReduceParams& params, cudaStream_t stream) {
  const Geometry& g = params.geometry;
  const bool aligned =
      is_aligned(g.extent, address(params.gradient.dz.data) | address(params.gradient.u.data) |
                               address(params.z.data));
  with_layout_variant(g.extent.rows, aligned, [&]<bool kRows, bool kAligned>() {
    SSP_LAUNCH((norm_reduce_kernel<kRows, kAligned>), dim3(g.blocks()), dim3(g.threads),
               gradient_shared(g), stream, params);
  });
}

inline void run_norm_reduce(const NormReduceParams& params, cudaStream_t stream) {
  run_norm_reduce_partials(params, stream);
  const Geometry& g = params.geometry;
  // The first part of every tile: its blocks are the grid's first.
  const dim3 grid(g.tiles);
  if (g.extent.rows) {
    SSP_LAUNCH((merge_sums_kernel<true>), grid, dim3(g.threads), gradient_shared(g), stream,
               params);
  } else {
    SSP_LAUNCH((merge_sums_kernel<false>), grid, dim3(g.threads), gradient_shared(g), stream,
               params);
  }
}

inline void run_norm_backward(const NormBackwardParams& params, cudaStream_t stream) {
  const Geometry& g = params.geometry;
  const bool aligned =
      is_aligned(g.extent, addresses(params.extras) | address(params.gradient.dz.data) |
                               address(params.gradient.u.data) | address(params.du.data));
  with_layout_variant(g.extent.rows, aligned, [&]<bool kRows, bool kAligned>() {
    SSP_LAUNCH((norm_backward_kernel<kRows, kAligned>), dim3(g.blocks()), dim3(g.threads),
               gradient_shared(g), stream, params);
  });
}

}  // namespace ssp
