#pragma once

#include "gradient.cuh"

namespace ssp {

constexpr int kReduceThreads = 256;
constexpr int kReduceBlocks = 2;    // a multiprocessor
constexpr int kReduceMaxWidth = 4;  // narrow tiles have few partial sums to merge
constexpr int kBackwardThreads = 256;
constexpr int kBackwardBlocks = 2;
constexpr int kBackwardMaxWidth = 32;  // units of a row that a block works on

// Units whose loads a thread has in flight.
template <Access kAccess>
constexpr int kGradientBatch = kAccess == Access::kNarrow ? 2 : 1;
constexpr int kLeastUnits = 2;  // of a thread, of a tensor that has enough

inline Geometry norm_reduce_geometry_on(const Extent& extent, const Device& device) {
  return channel_geometry(extent, kReduceMaxWidth, kReduceThreads,
                          summing_blocks(extent, kReduceBlocks, device), kLeastUnits);
}

inline Geometry norm_backward_geometry_on(const Extent& extent, const Device& device) {
  return channel_geometry(extent, kBackwardMaxWidth, kBackwardThreads,
                          streaming_blocks(kBackwardBlocks, device), kLeastUnits);
}

template <bool kRows, Access kAccess>
__global__ void __launch_bounds__(kReduceThreads, kReduceBlocks)
    norm_reduce_kernel(const NormReduceParams params) {
  SSP_DYN_SHARED(float, shared);
  const Geometry& geometry = params.geometry;
  const NormGradient& gradient = params.gradient;
  const Walk<kRows> walk(geometry);
  const SumScratch scratch(shared, kRows, geometry.tile_channels);
  const Affine<kRows> affine = affine_of(walk, gradient);
  const float scale = scale_of(gradient);
  const uint32_t step = geometry.active;
  constexpr int kBatch = kGradientBatch<kAccess>;
  ThreadSums<kRows> sums;
  for (uint32_t unit = walk.begin; unit < walk.end; unit += kBatch * step) {
    RawUnit<kAccess> raw_dz[kBatch];
    RawUnit<kAccess> raw_u[kBatch];
    Place places[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (unit + i * step >= walk.end) continue;
      places[i] = place_of<kAccess>(walk, unit + i * step);
      raw_dz[i] = load_unit<kAccess>(gradient.dz, places[i].offset, places[i].length);
      raw_u[i] = load_unit<kAccess>(gradient.u, places[i].offset, places[i].length);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const Place& place = places[i];
      if (unit + i * step >= walk.end) continue;
      float dz[kUnit];
      float u[kUnit];
      unpack(raw_dz[i], gradient.dz.storage, dz);
      unpack(raw_u[i], gradient.u.storage, u);
      UnitGradient<kRows> own(affine, gradient.activation, scale, dz, u);
      sums.add(own, place.length);
      if (params.z.data == nullptr) continue;
      activate_unit(gradient.activation, own.y);
      store_unit(params.z, place.offset, place.length, pack<kAccess>(own.y, params.z.storage));
    }
  }
  write_partial(walk, sums, scratch, params.sums.partials);
}

template <bool kRows>
__global__ void __launch_bounds__(kReduceThreads) merge_sums_kernel(const NormReduceParams params) {
  SSP_DYN_SHARED(float, shared);
  const Walk<kRows> walk(params.geometry);
  float* dy_xhat = shared + params.geometry.table();
  const SumScratch scratch(dy_xhat + params.geometry.table(), kRows, params.geometry.tile_channels);
  merge_partials(walk, params.sums, scratch, shared, dy_xhat);
}

// kMasked: dy follows from the mask, or from nothing, under fixed statistics; kFew: there is one
// extra at most.
template <bool kRows, Access kAccess, bool kMasked, bool kFew>
__global__ void __launch_bounds__(kBackwardThreads, kFew ? kBackwardBlocks : 1)
    norm_backward_kernel(const NormBackwardParams params) {
  const Geometry& geometry = params.geometry;
  const NormGradient& gradient = params.gradient;
  const Walk<kRows> walk(geometry);
  const bool merges = params.sums.partials != nullptr;
  const bool subtracts = merges || params.sum_dy.data != nullptr;
  const ChannelLoad<kRows> sum_dy(params.sum_dy, walk);
  const ChannelLoad<kRows> sum_dy_xhat(params.sum_dy_xhat, walk);
  const Affine<kRows> affine = affine_of(walk, gradient);
  GradientMeans<kRows> means;
  if constexpr (!kMasked) {
    means = {sum_dy.or_else(0), sum_dy_xhat.or_else(0)};
    if (merges) {
      SSP_DYN_SHARED(float, shared);
      float* dy_xhat = shared + geometry.table();
      const SumScratch scratch(dy_xhat + geometry.table(), kRows, geometry.tile_channels);
      merge_partials(walk, params.sums, scratch, shared, dy_xhat);
      means.dy = PerChannel<kRows>::of(shared, walk.column());
      means.dy_xhat = PerChannel<kRows>::of(dy_xhat, walk.column());
    }
    if (subtracts) {
      const bool counted = params.count_tensor.data != nullptr;
      means.scale(affine.gamma, counted ? value_at(params.count_tensor, 0) : params.count);
    }
  }
  const Extras<kAccess, kFew> extras(params.extras);
  const float scale = scale_of(gradient);

  struct Raw {
    RawUnit<kAccess> dz;
    RawUnit<kAccess> u;
    uint32_t bits;
    typename Extras<kAccess, kFew>::Raw extras;
  };
  const uint32_t step = geometry.active;
  constexpr int kBatch = kFew ? kGradientBatch<kAccess> : 1;
  for (uint32_t unit = walk.begin; unit < walk.end; unit += kBatch * step) {
    Raw raw[kBatch];
    Place places[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (unit + i * step >= walk.end) continue;
      const Place place = places[i] = place_of<kAccess>(walk, unit + i * step);
      raw[i].dz = load_unit<kAccess>(gradient.dz, place.offset, place.length);
      if constexpr (kMasked) {
        raw[i].bits = params.mask == nullptr ? 0xffu : params.mask[place.mask_byte];
      } else {
        raw[i].u = load_unit<kAccess>(gradient.u, place.offset, place.length);
      }
      raw[i].extras = extras.load(place);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (unit + i * step >= walk.end) continue;
      float dz[kUnit];
      float du[kUnit];
      unpack(raw[i].dz, gradient.dz.storage, dz);
      if constexpr (kMasked) {
        float dy[kUnit];
        masked_unit(gradient.activation, scale, dz, raw[i].bits, dy);
        fixed_gradient(dy, affine.rstd, affine.gamma, du);
      } else {
        float u[kUnit];
        unpack(raw[i].u, gradient.u.storage, u);
        const UnitGradient<kRows> own(affine, gradient.activation, scale, dz, u);
        if (subtracts) {
          own_gradient(own, affine, means, du);
        } else {
          fixed_gradient(own.dy, affine.rstd, affine.gamma, du);
        }
      }
      extras.add(raw[i].extras, places[i], du);
      store_unit(params.du, places[i].offset, places[i].length,
                 pack<kAccess>(du, params.du.storage));
    }
  }
}

inline void run_norm_reduce_partials(const NormReduceParams& params, cudaStream_t stream) {
  const Geometry& g = params.geometry;
  const NormGradient& gradient = params.gradient;
  const Access access = access_of(
      g.extent, address(gradient.dz.data) | address(gradient.u.data) | address(params.z.data),
      is_narrow(gradient.dz) && is_narrow(gradient.u) && is_narrow(params.z));
  with_layout_variant(g.extent.rows, access, [&]<bool kRows, Access kAccess>() {
    SSP_LAUNCH((norm_reduce_kernel<kRows, kAccess>), dim3(g.blocks()), dim3(g.threads),
               SumScratch::bytes(kRows, g.threads, g.tile_channels), stream, params);
  });
}

inline void run_norm_reduce(const NormReduceParams& params, cudaStream_t stream) {
  run_norm_reduce_partials(params, stream);
  const Geometry& g = params.geometry;
  // The first part of every tile: its blocks are the grid's first.
  const dim3 grid(g.tiles);
  if (g.extent.rows) {
    SSP_LAUNCH((merge_sums_kernel<true>), grid, dim3(g.threads), merging_shared(g), stream, params);
  } else {
    SSP_LAUNCH((merge_sums_kernel<false>), grid, dim3(g.threads), merging_shared(g), stream,
               params);
  }
}

inline void run_norm_backward(const NormBackwardParams& params, cudaStream_t stream) {
  const Geometry& g = params.geometry;
  const NormGradient& gradient = params.gradient;
  const Access access = access_of(g.extent,
                                  addresses(params.extras) | address(gradient.dz.data) |
                                      address(gradient.u.data) | address(params.du.data),
                                  is_narrow(params.extras) && is_narrow(gradient.dz) &&
                                      is_narrow(gradient.u) && is_narrow(params.du));
  const size_t shared = params.sums.partials != nullptr ? merging_shared(g) : 0;
  const bool few = params.extras.count <= 1;
  with_layout_variant(g.extent.rows, access, [&]<bool kRows, Access kAccess>() {
    const auto run = [&]<bool kMasked, bool kFew>() {
      SSP_LAUNCH((norm_backward_kernel<kRows, kAccess, kMasked, kFew>), dim3(g.blocks()),
                 dim3(g.threads), shared, stream, params);
    };
    // Tensors that are not aligned take the general path.
    if constexpr (kAccess == Access::kAny) {
      gradient.u.data == nullptr ? run.template operator()<true, false>()
                                 : run.template operator()<false, false>();
    } else if (gradient.u.data == nullptr) {
      few ? run.template operator()<true, true>() : run.template operator()<true, false>();
    } else {
      few ? run.template operator()<false, true>() : run.template operator()<false, false>();
    }
  });
}

}  // namespace ssp
