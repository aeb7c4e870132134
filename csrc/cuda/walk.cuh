#pragma once

#include "geometry.h"
#include "unit.cuh"

namespace ssp {

// A unit of the tile, by its place.
struct Place {
  int64_t offset;     // of its first element
  int64_t mask_byte;  // see _layout.mask_shape; where there is one sample
  int length;         // elements
  int column;         // of its first element in the tile's table of channels
};

// The share of one block, and in it that of one thread: units begin, begin + step, ...
template <bool kRows>
struct Walk {
  SSP_DEVICE explicit Walk(const Geometry& geometry)
      : g(geometry),
        tile(blockIdx.x % g.tiles),
        part(blockIdx.x / g.tiles % g.parts),
        sample(blockIdx.x / g.tiles / g.parts) {
    bool active = static_cast<int>(threadIdx.x) < g.active;
    if constexpr (kRows) {
      const uint32_t width = g.width.divisor;
      active = active && static_cast<int>(tile * width + threadIdx.x % width) < g.units;
    }
    const uint32_t first = g.part_begin(part, kRows);
    end = g.part_begin(part + 1, kRows);
    begin = active ? first + threadIdx.x : end;
  }

  SSP_DEVICE Place at(uint32_t unit) const {
    const uint32_t line = g.width.quotient(unit);
    const int in_line = static_cast<int>(unit - line * g.width.divisor);
    const int first = kRows ? tile * static_cast<int>(g.width.divisor) + in_line : in_line;
    const int64_t mask_line = kRows ? line : line * g.extent.c + tile;
    return {sample * g.sample_stride + tile * g.tile_stride + line * g.line_stride +
                in_line * int64_t{kUnit},
            mask_line * g.units + first,
            static_cast<int>(min(int64_t{kUnit}, length() - first * int64_t{kUnit})),
            kRows ? in_line * kUnit : static_cast<int>(line) * g.channel_step};
  }

  // The column of the thread's units in the tile's tables, and whether there are any; in planes of
  // one channel a tile.
  SSP_DEVICE int column() const {
    return kRows ? static_cast<int>(threadIdx.x % g.width.divisor) * kUnit : 0;
  }
  SSP_DEVICE bool works() const { return begin < end; }

  // Channels of the tensor that the tile's columns stand for.
  SSP_DEVICE int64_t first_channel() const { return int64_t{tile} * g.tile_channels; }
  SSP_DEVICE int columns() const {
    return static_cast<int>(min(int64_t{g.tile_channels}, g.extent.c - first_channel()));
  }

  // Elements of one channel in the units before this one, which begins a line in rows.
  SSP_DEVICE int64_t elements_before(uint32_t unit) const {
    const uint32_t line = g.width.quotient(unit);
    if constexpr (kRows) return line;
    const int64_t in_line = unit - line * g.width.divisor;
    return line * length() + min(length(), in_line * kUnit);
  }
  SSP_DEVICE int64_t part_elements(int p) const {
    return elements_before(g.part_begin(p + 1, kRows)) - elements_before(g.part_begin(p, kRows));
  }

  // Elements of a whole line.
  SSP_DEVICE int64_t length() const { return kRows ? g.extent.c : g.extent.s; }

  const Geometry& g;
  int tile;
  int part;
  int sample;
  uint32_t begin;
  uint32_t end;
};

// A per-channel value for each element of a unit: one for all of them in planes.
template <bool kRows>
struct PerChannel {
  static constexpr int kWidth = kRows ? kUnit : 1;

  SSP_DEVICE static PerChannel of(float value) {
    PerChannel channel;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) channel.value[e] = value;
    return channel;
  }
  SSP_DEVICE static PerChannel of(const float* table, int column) {
    PerChannel channel;
    if constexpr (kRows) {
#pragma unroll
      for (int e = 0; e < kUnit; e += 4) {
        const float4 four = *reinterpret_cast<const float4*>(table + column + e);
        channel.value[e] = four.x;
        channel.value[e + 1] = four.y;
        channel.value[e + 2] = four.z;
        channel.value[e + 3] = four.w;
      }
    } else {
      channel.value[0] = table[column];
    }
    return channel;
  }
  // Those of a thread's units, from a vector over all channels.
  SSP_DEVICE static PerChannel of(const Operand& vector, const Walk<kRows>& walk, float missing) {
    if (vector.data == nullptr || !walk.works()) return of(missing);
    const int64_t first = walk.first_channel() + walk.column();
    PerChannel channel;
    if constexpr (kRows) {
      if (first + kUnit <= walk.g.extent.c && vector.storage != Storage::kDouble &&
          reinterpret_cast<uintptr_t>(vector.data) % 16 == 0) {
        unpack(load_unit<Access::kWide>(vector, first, kUnit), vector.storage, channel.value);
        return channel;
      }
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const bool exists = !kRows || first + e < walk.g.extent.c;
      channel.value[e] = exists ? value_at(vector, first + e) : missing;
    }
    return channel;
  }
  SSP_DEVICE float operator[](int e) const { return value[kRows ? e : 0]; }
  SSP_DEVICE float& operator[](int e) { return value[kRows ? e : 0]; }

  float value[kWidth];
};

// Fills a table of the tile's channels from a vector over all channels.
template <bool kRows>
SSP_DEVICE void fill_table(const Walk<kRows>& walk, const Operand& vector, float missing,
                           float* table) {
  for (int i = threadIdx.x; i < walk.g.tile_channels; i += blockDim.x) {
    table[i] = i < walk.columns() ? value_or(vector, walk.first_channel() + i, missing) : missing;
  }
}

}  // namespace ssp
