#pragma once

#include "group_norm.h"
#include "moments.cuh"
#include "normalize.cuh"
#include "shelf.cuh"
#include "stage.cuh"

namespace ssp {

// Group g of the tile, whose columns of the tables are [first, first + members).
struct Group {
  template <bool kRows>
  SSP_DEVICE Group(const Walk<kRows>& walk, int members, int g)
      : first(g * members), index((walk.first_channel() + first) / members) {}
  int first;
  int64_t index;  // in the sample
};

// The total of a group's columns, which are one in planes.
template <bool kRows>
SSP_DEVICE double group_total(const double* totals, const Group& group, int members) {
  if constexpr (!kRows) return totals[0];
  double total = 0;
  for (int i = 0; i < members; ++i) total += totals[group.first + i];
  return total;
}

// Statistics of the tile's groups, to tables over their channels, and written out.
template <bool kRows>
SSP_DEVICE void group_statistics(const Walk<kRows>& walk, const GroupNormParams& params,
                                 const ThreadMoments<kRows>& moments, const SumScratch& scratch,
                                 const AffineTables& tables) {
  const int members = static_cast<int>(params.extent.c / params.num_groups);
  const int groups = walk.columns() / members;
  const double count = static_cast<double>(members) * params.extent.s;
  const int column = kRows ? static_cast<int>(threadIdx.x % walk.g.width.divisor) * kUnit : 0;
  const auto for_each_group = [&](float* table, const auto& value) {
    for (int g = threadIdx.x; g < groups; g += blockDim.x) {
      const Group group(walk, members, g);
      const float common = value(group, group_total<kRows>(scratch.totals, group, members) / count);
      for (int i = 0; i < members; ++i) table[group.first + i] = common;
    }
    __syncthreads();
  };
  const auto at = [&](const Group& group) {
    return walk.sample * int64_t{params.num_groups} + group.index;
  };
  block_sum(moments.sum, walk, scratch);
  for_each_group(tables.mean, [&](const Group& group, double mean) {
    return params.mean[at(group)] = static_cast<float>(mean);
  });
  const auto centre = PerChannel<kRows>::of(tables.mean, column);
  block_sum(moments.squares_about(centre), walk, scratch);
  for_each_group(tables.rstd, [&](const Group& group, double variance) {
    return params.rstd[at(group)] = reciprocal_deviation(static_cast<float>(variance), params.eps);
  });
}

template <bool kRows, int kTerms, Access kAccess>
__global__ void __launch_bounds__(kGroupNormThreads, 1)
    group_norm_kernel(const GroupNormParams params, const Geometry geometry, bool keeps) {
  SSP_DYN_SHARED(float, shared);
  const Walk<kRows> walk(geometry);
  const AffineTables tables(shared, geometry.table());
  const SumScratch scratch(tables.end(), kRows, geometry.tile_channels);
  const Shelf shelf(scratch.end());
  tables.fill(walk, params.gamma, params.beta);
  __syncthreads();

  const Storage storage = params.stage.u.storage;
  const int vectors = Shelf::words(storage) / 4;
  const Stage<kRows, kTerms, kAccess> stage(params.stage, walk,
                                            ChannelLoad<kRows>(params.stage.channel_bias, walk));
  ThreadMoments<kRows> moments;
  int kept = 0;
  for_each_stage_unit(walk, stage, [&](const Place& place, const float (&u)[kUnit]) {
    moments.add(u, place.length);
    if (keeps) shelf.put(kept, storage, pack<kAccess>(u, storage));
    kept += vectors;
  });
  group_statistics(walk, params, moments, scratch, tables);

  const auto normalize = [&](const Place& place, const float (&u)[kUnit]) {
    float z[kUnit];
    Affine<kRows>(tables, place.column).y(u, z);
    activate_unit(params.activation, z);
    store_unit(params.z, place.offset, place.length, pack<kAccess>(z, params.z.storage));
  };
  if (!keeps) {
    for_each_stage_unit(walk, stage, normalize);
    return;
  }
  kept = 0;
  for (uint32_t unit = walk.begin; unit < walk.end; unit += geometry.active) {
    float u[kUnit];
    unpack(shelf.get(kept, storage), storage, u);
    normalize(walk.at(unit), u);
    kept += vectors;
  }
}

inline size_t group_norm_shared_of(const Geometry& g) {
  return AffineTables::kTables * sizeof(float) * g.table() +
         SumScratch::bytes(g.extent.rows, g.threads, g.tile_channels);
}

inline void run_group_norm(const GroupNormParams& params, const Device& device,
                           cudaStream_t stream) {
  const Geometry g = group_geometry(params.extent, params.num_groups);
  const size_t base = group_norm_shared_of(g);
  const int units = static_cast<int>((g.part_units() + g.active - 1) / g.active);
  const size_t shelf =
      Shelf::bytes(units, Shelf::words(params.stage.u.storage), g.threads, base, device);
  const Access access =
      access_of(params.extent,
                addresses(params.stage.sum) | address(params.stage.u.data) | address(params.z.data),
                is_narrow(params.stage.sum) && is_narrow(params.z));
  with_stage_variant(params.extent.rows, params.stage.sum.count, access,
                     [&]<bool kRows, int kTerms, Access kAccess>() {
                       SSP_LAUNCH((group_norm_kernel<kRows, kTerms, kAccess>), dim3(g.blocks()),
                                  dim3(g.threads), base + shelf, stream, params, g, shelf > 0);
                     });
}

}  // namespace ssp
