#pragma once

// How an activation is cut into blocks where channels matter. A tile is what a block may work on:
// one channel in planes, a few neighbouring channels in rows. Its units (unit.cuh) lie in lines of
// `width` units: a channel's planes, or the tile's piece of every row. The tile's blocks, its
// parts, take an even share of the units each, in order. In rows a thread keeps to its channels.

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../extent.h"
#include "../math/divider.h"
#include "../math/macros.h"
#include "device.h"

namespace ssp {

constexpr int64_t kMaxUnits = int64_t{1} << 31;

struct Geometry {
  Extent extent;
  int threads;        // of a block
  int active;         // threads with work
  int samples;        // that are worked on apart: 1 where statistics are over all of them
  int tiles;          // of a sample
  int parts;          // blocks of a tile
  int tile_channels;  // columns of per-channel tables
  int units;          // of a whole line
  Divider width;      // units of a line inside the tile
  uint32_t tile_units;
  uint32_t share;       // of a part: lines in rows, units in planes
  uint32_t longer;      // parts that have one more
  int channel_step;     // in the tile's tables, from a line to the next
  int64_t line_stride;  // in elements, as the two below
  int64_t tile_stride;
  int64_t sample_stride;

  unsigned blocks() const { return static_cast<unsigned>(samples) * tiles * parts; }
  // Values of a table over the tile's channels: a multiple of 16 bytes.
  SSP_HD int table() const { return (tile_channels + 3) / 4 * 4; }
  // The part begins with this unit of the tile.
  SSP_HD uint32_t part_begin(uint32_t part, bool rows) const {
    const uint32_t shares = part * share + (part < longer ? part : longer);
    return rows ? shares * width.divisor : shares;
  }
  // Units of the largest part, which is the first.
  uint32_t part_units() const { return part_begin(1, extent.rows); }

  void cut(int count) {
    parts = count;
    const uint32_t shares = extent.rows ? tile_units / width.divisor : tile_units;
    share = shares / count;
    longer = shares % count;
  }
};

// For statistics over all samples, blocks of `threads`, about `blocks` of them, but no more than
// give every thread `least` units, and rows cut into pieces of at most `max_width` units. The
// tensor is not empty.
inline Geometry channel_geometry(const Extent& extent, int max_width, int threads, int blocks,
                                 int least = 1) {
  Geometry g{};
  g.extent = extent;
  g.threads = threads;
  g.samples = 1;
  g.units = static_cast<int>((extent.line_length() + 7) / 8);
  if (extent.rows) {
    g.tiles = (g.units + max_width - 1) / max_width;
    const int width = (g.units + g.tiles - 1) / g.tiles;
    g.width = Divider(static_cast<uint32_t>(width));
    g.tile_channels = 8 * width;
    g.tile_units = static_cast<uint32_t>(extent.per_channel() * width);
    g.line_stride = extent.c;
    g.tile_stride = 8 * width;
    g.active = threads / width * width;
  } else {
    g.tiles = static_cast<int>(extent.c);
    g.width = Divider(static_cast<uint32_t>(g.units));
    g.tile_channels = 1;
    g.tile_units = static_cast<uint32_t>(extent.n * g.units);
    g.line_stride = extent.c * extent.s;
    g.tile_stride = extent.s;
    g.active = threads;
  }
  const int64_t units = int64_t{g.active} * least;
  const int filled = static_cast<int>((int64_t{g.tile_units} + units - 1) / units);
  g.cut(std::max(1, std::min(blocks / g.tiles, filled)));
  return g;
}

// Blocks of a kernel that sums, whose blocks' sums are to be added up. In planes there are several
// times as many as a GPU holds: channels seldom divide them, and more blocks leave less over.
inline int summing_blocks(const Extent& extent, int per_multiprocessor, const Device& device) {
  constexpr int kPlaneWaves = 4;
  return per_multiprocessor * device.multiprocessors * (extent.rows ? 1 : kPlaneWaves);
}

// Blocks of a kernel that does not: several times as many as a GPU holds, which end at different
// times and keep its memory busy.
inline int streaming_blocks(int per_multiprocessor, const Device& device) {
  constexpr int kWaves = 8;
  return per_multiprocessor * device.multiprocessors * kWaves;
}

constexpr int kGroupNormThreads = 384;  // at most

// For statistics of each sample and group, and one part: the tile holds whole groups. Its lines are
// the group's channels in planes.
inline Geometry group_geometry(const Extent& extent, int num_groups) {
  constexpr int kLeastThreads = 96;
  constexpr int kWidth = 8;  // units of a row, where groups allow it
  Geometry g{};
  g.extent = extent;
  g.samples = static_cast<int>(extent.n);
  g.sample_stride = extent.c * extent.s;
  g.units = static_cast<int>((extent.line_length() + 7) / 8);
  const int64_t members = extent.c / num_groups;
  if (extent.rows) {
    int width = g.units;
    if (extent.c % 8 == 0) {
      const int least = static_cast<int>(std::lcm(int64_t{8}, members) / 8);
      width = least;
      while (width + least <= kWidth && g.units % (width + least) == 0) width += least;
    }
    g.tiles = g.units / width;
    g.width = Divider(static_cast<uint32_t>(width));
    g.tile_channels = 8 * width;
    g.tile_units = static_cast<uint32_t>(extent.s * width);
    g.line_stride = extent.c;
    g.tile_stride = 8 * width;
  } else {
    g.tiles = num_groups;
    g.width = Divider(static_cast<uint32_t>(g.units));
    g.tile_channels = static_cast<int>(members);
    g.tile_units = static_cast<uint32_t>(members * g.units);
    g.channel_step = 1;
    g.line_stride = extent.s;
    g.tile_stride = members * extent.s;
  }
  g.threads = kLeastThreads;
  while (g.threads < kGroupNormThreads &&
         (g.tile_units / 2 > static_cast<uint32_t>(g.threads) ||
          (extent.rows && static_cast<int>(g.width.divisor) > g.threads))) {
    g.threads *= 2;
  }
  g.active = extent.rows ? g.threads / g.width.divisor * g.width.divisor : g.threads;
  g.cut(1);
  return g;
}

}  // namespace ssp
