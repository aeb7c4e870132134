#pragma once

#include "gradient.cuh"
#include "group_norm_backward.h"
#include "shelf.cuh"

namespace ssp {

// A thread's units of dz and of u with its bias, read once and kept on the shelf if there is room.
template <bool kRows, Access kAccess>
struct GroupUnits {
  SSP_DEVICE GroupUnits(const GroupNormBackwardParams& p, const float* bias_table, void* shared,
                        bool with_shelf)
      : gradient(p.gradient),
        biases(bias_table),
        shelf(shared),
        keeps(with_shelf),
        dz_vectors(Shelf::words(gradient.dz.storage) / 4),
        vectors(dz_vectors + Shelf::words(gradient.u.storage) / 4) {}

  // The thread's unit number `i`; `first`: it is read for the first time.
  SSP_DEVICE void read(const Place& place, int i, bool first, float (&dz)[kUnit],
                       float (&u)[kUnit]) const {
    if (keeps && !first) {
      unpack(shelf.get(i * vectors, gradient.dz.storage), gradient.dz.storage, dz);
      unpack(shelf.get(i * vectors + dz_vectors, gradient.u.storage), gradient.u.storage, u);
      return;
    }
    const auto raw_dz = load_unit<kAccess>(gradient.dz, place.offset, place.length);
    auto raw_u = load_unit<kAccess>(gradient.u, place.offset, place.length);
    unpack(raw_dz, gradient.dz.storage, dz);
    unpack(raw_u, gradient.u.storage, u);
    if (biases != nullptr) {
      const auto bias = PerChannel<kRows>::of(biases, place.column);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) u[e] += bias[e];
      raw_u = pack<kAccess>(u, gradient.u.storage);
      unpack(raw_u, gradient.u.storage, u);
    }
    if (!keeps) return;
    shelf.put(i * vectors, gradient.dz.storage, raw_dz);
    shelf.put(i * vectors + dz_vectors, gradient.u.storage, raw_u);
  }

  const NormGradient& gradient;
  const float* biases;
  Shelf shelf;
  bool keeps;
  int dz_vectors;
  int vectors;
};

// Tables of the tile's channels: sums over the sample, beside those of GradientTables.
struct SampleTables : GradientTables {
  static constexpr int kTables = GradientTables::kTables + 4;

  SSP_DEVICE SampleTables(float* shared, int table)
      : GradientTables(shared, table),
        biases(static_cast<float*>(GradientTables::end())),
        dy(biases + table),
        dy_xhat(dy + table),
        xhat(dy_xhat + table),
        after(xhat + table) {}
  SSP_DEVICE void* end() const { return after; }

  float* biases;
  float* dy;
  float* dy_xhat;
  float* xhat;
  float* after;
};

// Moves the totals of the columns to a table, from its entry `first` on.
SSP_DEVICE void keep_totals(const SumScratch& scratch, int columns, float* table) {
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    table[i] = static_cast<float>(scratch.totals[i]);
  }
  __syncthreads();
}

// What input_gradient subtracts, from the sums by channel; these are written out.
template <bool kRows>
SSP_DEVICE void group_means(const Walk<kRows>& walk, const GroupNormBackwardParams& params,
                            const SampleTables& tables) {
  const int members = static_cast<int>(params.extent.c / params.num_groups);
  const int columns = walk.columns();
  const double size = static_cast<double>(params.extent.s);
  const int64_t at = walk.sample * params.extent.c + walk.first_channel();
  for (int g = threadIdx.x; g < columns / members; g += blockDim.x) {
    double dy = 0;
    double dy_xhat = 0;
    for (int i = g * members; i < (g + 1) * members; ++i) {
      dy += tables.gamma[i] * static_cast<double>(tables.dy[i]);
      dy_xhat += tables.gamma[i] * static_cast<double>(tables.dy_xhat[i]);
    }
    dy /= members * size;
    dy_xhat /= members * size;
    for (int i = g * members; i < (g + 1) * members; ++i) {
      tables.mean_dy[i] = static_cast<float>(dy);
      tables.mean_dy_xhat[i] = static_cast<float>(dy_xhat);
      // input_gradient, summed: 0 where a channel is a group.
      const double own = tables.rstd[i] * (tables.gamma[i] * static_cast<double>(tables.dy[i]) -
                                           size * dy - tables.xhat[i] * dy_xhat);
      params.sums.own[at + i] = members == 1 ? 0 : static_cast<float>(own);
    }
  }
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    params.sums.dgamma[at + i] = tables.dy_xhat[i];
    params.sums.dbeta[at + i] = tables.dy[i];
  }
  __syncthreads();
}

template <bool kRows, Access kAccess>
__global__ void __launch_bounds__(kGroupNormThreads, 1)
    group_norm_backward_kernel(const GroupNormBackwardParams params, const Geometry geometry,
                               bool keeps) {
  SSP_DYN_SHARED(float, shared);
  const NormGradient& gradient = params.gradient;
  const Walk<kRows> walk(geometry);
  const SampleTables tables(shared, geometry.table());
  const SumScratch scratch(tables.end(), kRows, geometry.tile_channels);
  tables.AffineTables::fill(walk, gradient.gamma, gradient.beta);
  const int members = static_cast<int>(params.extent.c / params.num_groups);
  for (int i = threadIdx.x; i < geometry.tile_channels; i += blockDim.x) {
    const bool exists = i < walk.columns();
    const int64_t at = walk.sample * int64_t{params.num_groups} +
                       (exists ? (walk.first_channel() + i) / members : 0);
    tables.mean[i] = exists ? value_at(gradient.mean, at) : 0;
    tables.rstd[i] = exists ? value_at(gradient.rstd, at) : 1;
  }
  const bool biased = params.channel_bias.data != nullptr;
  if (biased) fill_table(walk, params.channel_bias, 0, tables.biases);
  __syncthreads();

  const GroupUnits<kRows, kAccess> units(params, biased ? tables.biases : nullptr, scratch.end(),
                                         keeps);
  const float scale = scale_of(gradient);
  // Calls f(place, own) for the thread's units of the lines first, ..., last - 1, the i-th on.
  const auto for_each = [&](uint32_t begin, uint32_t end, int i, bool first, const auto& f) {
    for (uint32_t unit = begin; unit < end; unit += geometry.active, ++i) {
      const Place place = walk.at(unit);
      float dz[kUnit];
      float u[kUnit];
      units.read(place, i, first, dz, u);
      const Affine<kRows> affine(tables, place.column);
      UnitGradient<kRows> own(affine, gradient.activation, scale, dz, u);
      f(place, own);
    }
    return i;
  };
  const auto reduce = [&](uint32_t begin, uint32_t end, int i, int column) {
    ThreadSums<kRows> sums;
    auto xhat = PerChannel<kRows>::of(0);
    i = for_each(begin, end, i, true, [&](const Place& place, UnitGradient<kRows>& own) {
      sums.add(own, place.length);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) xhat[e] += e < place.length ? own.xhat[e] : 0;
      if (params.z.data == nullptr) return;
      activate_unit(gradient.activation, own.y);
      store_unit(params.z, place.offset, place.length, pack<kAccess>(own.y, params.z.storage));
    });
    const int columns = kRows ? geometry.tile_channels : 1;
    const PerChannel<kRows> all[] = {sums.dy, sums.dy_xhat, xhat};
    block_sum(all, walk, scratch);
    keep_totals(scratch, columns, tables.dy + column);
    keep_totals(scratch.from(columns), columns, tables.dy_xhat + column);
    keep_totals(scratch.from(2 * columns), columns, tables.xhat + column);
    return i;
  };

  const Extras<kAccess, false> extras(params.extras);
  const auto finish = [&](const Place& place, const UnitGradient<kRows>& own) {
    float du[kUnit];
    const GradientMeans<kRows> means{PerChannel<kRows>::of(tables.mean_dy, place.column),
                                     PerChannel<kRows>::of(tables.mean_dy_xhat, place.column)};
    own_gradient(own, Affine<kRows>(tables, place.column), means, du);
    extras.add({}, place, du);
    store_unit(params.du, place.offset, place.length, pack<kAccess>(du, params.du.storage));
  };
  // In planes a line is a channel, and summed by itself.
  const auto for_each_line = [&](const auto& f) {
    int i = 0;
    if constexpr (kRows) {
      f(walk.begin, walk.end, i, 0);
    } else {
      const uint32_t units_of_line = geometry.width.divisor;
      for (int line = 0; line < geometry.tile_channels; ++line) {
        const uint32_t end = (line + 1) * units_of_line;
        i = f(line * units_of_line + threadIdx.x, end, i, line);
      }
    }
  };
  for_each_line(reduce);
  group_means(walk, params, tables);
  for_each_line([&](uint32_t begin, uint32_t end, int i, int) {
    return for_each(begin, end, i, false, finish);
  });
}

inline size_t group_norm_backward_shared_of(const Geometry& g) {
  return SampleTables::kTables * sizeof(float) * g.table() +
         SumScratch::bytes(g.extent.rows, g.threads, g.tile_channels);
}

inline void run_group_norm_backward(const GroupNormBackwardParams& params, const Device& device,
                                    cudaStream_t stream) {
  const Geometry g = group_geometry(params.extent, params.num_groups);
  const NormGradient& gradient = params.gradient;
  const size_t base = group_norm_backward_shared_of(g);
  const int words = Shelf::words(gradient.dz.storage) + Shelf::words(gradient.u.storage);
  // In planes a thread's units are counted line by line.
  const int lines = g.extent.rows ? 1 : g.tile_channels;
  const uint32_t line_units = g.part_units() / lines;
  const int units = lines * static_cast<int>((line_units + g.active - 1) / g.active);
  const size_t shelf = Shelf::bytes(units, words, g.threads, base, device);
  const Access access =
      access_of(params.extent,
                addresses(params.extras) | address(gradient.dz.data) | address(gradient.u.data) |
                    address(params.z.data) | address(params.du.data),
                is_narrow(params.extras) && is_narrow(gradient.dz) && is_narrow(gradient.u) &&
                    is_narrow(params.z) && is_narrow(params.du));
  with_layout_variant(params.extent.rows, access, [&]<bool kRows, Access kAccess>() {
    SSP_LAUNCH((group_norm_backward_kernel<kRows, kAccess>), dim3(g.blocks()), dim3(g.threads),
               base + shelf, stream, params, g, shelf > 0);
  });
}

}  // namespace ssp
