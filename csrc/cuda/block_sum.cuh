#pragma once

// Sums over a block in a fixed order, and over the partial sums of several blocks.

#include "walk.cuh"

namespace ssp {

constexpr int kWarp = 32;
constexpr int kSegments = 16;  // pieces that a column's values are summed in
constexpr int kPad = 4;        // keeps the columns of a staged table in different banks

// Whether the lanes of a warp that share a column of rows lie a fixed number of lanes apart, and
// what `sums` sums leave of each warp is no more than a value for every thread and element of a
// unit.
SSP_HD bool sums_by_shuffles(int sums, int width) {
  return sums * width <= kWarp && (width & (width - 1)) == 0;
}

// Shared memory of the sums of a block: values of threads or warps, and partial sums by column. Up
// to kSums sums are formed at once by block_sum, kMerged by sum_columns: totals[k * columns +
// column].
struct SumScratch {
  static constexpr int kSums = 3;
  static constexpr int kMerged = 2;

  static SSP_HD int staged_values(bool rows, int threads, int columns) {
    if (!rows) return 0;
    return sums_by_shuffles(kSums, columns / kUnit) ? kSums * (threads / kWarp) * columns
                                                    : kUnit * (threads + kPad);
  }
  static SSP_HD int partial_values(int threads, int columns) {
    const int segments = kSegments * columns < threads ? kSegments * columns : threads;
    const int merged = kMerged * (columns > segments ? columns : segments);
    const int of_warps = (kSums * (threads / kWarp) + 1) / 2 * 2;  // what follows is on 16 bytes
    return merged > of_warps ? merged : of_warps;
  }
  static SSP_HD size_t bytes(bool rows, int threads, int columns) {
    return sizeof(float) * staged_values(rows, threads, columns) +
           sizeof(double) * (partial_values(threads, columns) + kSums * ((columns + 1) / 2 * 2));
  }
  SSP_DEVICE SumScratch(void* shared, bool rows, int columns)
      : staged(static_cast<float*>(shared)),
        partial(reinterpret_cast<double*>(staged + staged_values(rows, blockDim.x, columns))),
        totals(partial + partial_values(blockDim.x, columns)),
        after(totals + kSums * ((columns + 1) / 2 * 2)) {}
  SSP_DEVICE void* end() const { return after; }
  // The same with totals that begin at `first`.
  SSP_DEVICE SumScratch from(int first) const {
    SumScratch rest = *this;
    rest.totals += first;
    return rest;
  }

  float* staged;
  double* partial;
  double* totals;

 private:
  double* after;
};

// Shared memory of a block that merges partial results: two tables over the tile's channels, and
// its sums.
inline size_t merging_shared(const Geometry& g) {
  return 2 * sizeof(float) * g.table() +
         SumScratch::bytes(g.extent.rows, g.threads, g.tile_channels);
}

// totals[k * columns + column] = the sum over i < count of what add(i, column, sums) adds to
// sums[k], formed by the whole block. Ends with a barrier; needs one before it where `add` reads
// shared memory.
template <int kCount, class F>
SSP_DEVICE void sum_columns(int count, int columns, const SumScratch& scratch, const F& add) {
  static_assert(kCount <= SumScratch::kMerged);
  const int threads = blockDim.x;
  const int segments = max(1, min(kSegments, threads / columns));
  const int values = columns * segments;
  for (int i = threadIdx.x; i < values; i += threads) {
    const int column = i % columns;
    double sums[kCount] = {};
#pragma unroll 4
    for (int j = i / columns; j < count; j += segments) add(j, column, sums);
#pragma unroll
    for (int k = 0; k < kCount; ++k) scratch.partial[k * values + i] = sums[k];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kCount * columns; i += threads) {
    const double* own = scratch.partial + i / columns * values + i % columns;
    double total = 0;
    for (int s = 0; s < segments; ++s) total += own[s * columns];
    scratch.totals[i] = total;
  }
  __syncthreads();
}

// The sum over the lanes whose numbers are the same modulo `width`, a power of two.
SSP_DEVICE float warp_sum(float value, int width = 1) {
  for (int offset = kWarp / 2; offset >= width; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// totals[k * columns + column] = the sum of all threads' values[k] of the column. Idle threads'
// values must be 0. `width`: units of a line in the tile, in rows.
template <bool kRows, int kCount>
SSP_DEVICE void block_sum(const PerChannel<kRows> (&values)[kCount], int width, int active,
                          const SumScratch& scratch) {
  const int warps = blockDim.x / kWarp;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if constexpr (kRows) {
    const int columns = kUnit * width;
    if (sums_by_shuffles(kCount, width)) {
      // What a warp's lanes have of a column first: they lie `width` apart.
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        float* row = scratch.staged + (k * warps + warp) * columns + lane * kUnit;
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
          const float sum = warp_sum(values[k][e], width);
          if (lane < width) row[e] = sum;
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < kCount * columns; i += blockDim.x) {
        const float* own = scratch.staged + i / columns * warps * columns + i % columns;
        double total = 0;
        for (int w = 0; w < warps; ++w) total += own[w * columns];
        scratch.totals[i] = total;
      }
      __syncthreads();
      return;
    }
    const int pitch = blockDim.x + kPad;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int e = 0; e < kUnit; ++e) scratch.staged[e * pitch + threadIdx.x] = values[k][e];
      __syncthreads();
      const SumScratch own = scratch.from(k * columns);
      sum_columns<1>(active / width, columns, own, [&](int line, int column, double* sums) {
        sums[0] += scratch.staged[column % kUnit * pitch + line * width + column / kUnit];
      });
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float sum = warp_sum(values[k][0]);
      if (lane == 0) scratch.partial[k * warps + warp] = sum;
    }
    __syncthreads();
    for (int k = threadIdx.x; k < kCount; k += blockDim.x) {
      double total = 0;
      for (int w = 0; w < warps; ++w) total += scratch.partial[k * warps + w];
      scratch.totals[k] = total;
    }
    __syncthreads();
  }
}

template <bool kRows, int kCount>
SSP_DEVICE void block_sum(const PerChannel<kRows> (&values)[kCount], const Walk<kRows>& walk,
                          const SumScratch& scratch) {
  block_sum(values, static_cast<int>(walk.g.width.divisor), walk.g.active, scratch);
}

template <bool kRows>
SSP_DEVICE void block_sum(const PerChannel<kRows>& values, const Walk<kRows>& walk,
                          const SumScratch& scratch) {
  const PerChannel<kRows> one[1] = {values};
  block_sum(one, walk, scratch);
}

}  // namespace ssp
