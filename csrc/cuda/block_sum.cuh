#pragma once

// Sums over a block in a fixed order, and over the partial sums of several blocks.

#include "walk.cuh"

namespace ssp {

constexpr int kWarp = 32;
constexpr int kSegments = 16;  // pieces that a column's values are summed in
constexpr int kPad = 4;        // keeps the columns of a staged table in different banks

// Shared memory of the sums of a block: the values of all threads, and partial sums by column.
struct SumScratch {
  static SSP_HD size_t bytes(bool rows, int threads, int columns) {
    const size_t staged = rows ? sizeof(float) * kUnit * (threads + kPad) : 0;
    const size_t most = columns > threads ? columns : threads;
    return staged + sizeof(double) * (most + (columns + 1) / 2 * 2);
  }
  SSP_DEVICE SumScratch(void* shared, bool rows, int columns)
      : staged(static_cast<float*>(shared)),
        partial(reinterpret_cast<double*>(staged + (rows ? kUnit * (blockDim.x + kPad) : 0))),
        totals(partial + (columns > static_cast<int>(blockDim.x) ? columns : blockDim.x)),
        after(totals + (columns + 1) / 2 * 2) {}
  SSP_DEVICE void* end() const { return after; }

  float* staged;
  double* partial;
  double* totals;

 private:
  double* after;
};

// totals[column] = sum over i < count of value(i, column), formed by the whole block. Ends with a
// barrier; needs one before it where `value` reads shared memory.
template <class F>
SSP_DEVICE void sum_columns(int count, int columns, const SumScratch& scratch, const F& value) {
  const int threads = blockDim.x;
  const int segments = max(1, min(kSegments, threads / columns));
  for (int i = threadIdx.x; i < columns * segments; i += threads) {
    const int column = i % columns;
    double sum = 0;
    for (int j = i / columns; j < count; j += segments) sum += value(j, column);
    scratch.partial[i] = sum;
  }
  __syncthreads();
  for (int column = threadIdx.x; column < columns; column += threads) {
    double total = 0;
    for (int s = 0; s < segments; ++s) total += scratch.partial[s * columns + column];
    scratch.totals[column] = total;
  }
  __syncthreads();
}

SSP_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// totals[column] = the sum of all threads' values of the column. Idle threads' values must be 0.
// `width`: units of a line in the tile, in rows.
template <bool kRows>
SSP_DEVICE void block_sum(const PerChannel<kRows>& values, int width, int active,
                          const SumScratch& scratch) {
  if constexpr (kRows) {
    const int pitch = blockDim.x + kPad;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) scratch.staged[e * pitch + threadIdx.x] = values[e];
    __syncthreads();
    sum_columns(active / width, kUnit * width, scratch, [&](int line, int column) {
      return scratch.staged[column % kUnit * pitch + line * width + column / kUnit];
    });
  } else {
    const float sum = warp_sum(values[0]);
    if (threadIdx.x % kWarp == 0) scratch.partial[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      double total = 0;
      for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) total += scratch.partial[w];
      scratch.totals[0] = total;
    }
    __syncthreads();
  }
}

template <bool kRows>
SSP_DEVICE void block_sum(const PerChannel<kRows>& values, const Walk<kRows>& walk,
                          const SumScratch& scratch) {
  block_sum(values, static_cast<int>(walk.g.width.divisor), walk.g.active, scratch);
}

}  // namespace ssp
