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

// The place of a unit, whose length is known where all units are whole.
template <Access kAccess, bool kRows>
SSP_DEVICE Place place_of(const Walk<kRows>& walk, uint32_t unit) {
  Place place = walk.at(unit);
  if constexpr (kAccess != Access::kAny) place.length = kUnit;
  return place;
}

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
  SSP_DEVICE float operator[](int e) const { return value[kRows ? e : 0]; }
  SSP_DEVICE float& operator[](int e) { return value[kRows ? e : 0]; }

  float value[kWidth];
};

// What a vector over all channels has for the units of a thread that keeps to its channels: loaded
// at once, looked at later, so that several vectors are on their way together.
template <bool kRows>
struct ChannelLoad {
  SSP_DEVICE ChannelLoad(const Operand& from, const Walk<kRows>& walk)
      : vector(from),
        first(walk.first_channel() + walk.column()),
        channels(walk.g.extent.c),
        exists(from.data != nullptr && walk.works()),
        whole(exists && from.storage != Storage::kDouble) {
    if constexpr (kRows) {
      whole =
          whole && first + kUnit <= channels && reinterpret_cast<uintptr_t>(vector.data) % 16 == 0;
      if (whole) raw = load_unit<Access::kWide>(vector, first, kUnit);
    } else {
      if (whole) raw = load_unit<Access::kAny>(vector, first, 1);
    }
  }

  SSP_DEVICE PerChannel<kRows> or_else(float missing) const {
    auto channel = PerChannel<kRows>::of(missing);
    if (whole) {
      float values[kUnit];
      unpack(raw, vector.storage, values);
#pragma unroll
      for (int e = 0; e < PerChannel<kRows>::kWidth; ++e) channel[e] = values[e];
    } else if (exists) {
#pragma unroll
      for (int e = 0; e < PerChannel<kRows>::kWidth; ++e) {
        if (first + e < channels) channel[e] = value_at(vector, first + e);
      }
    }
    return channel;
  }

 private:
  const Operand& vector;
  int64_t first;
  int64_t channels;
  bool exists;
  bool whole;
  RawUnit<kRows ? Access::kWide : Access::kAny> raw;
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
