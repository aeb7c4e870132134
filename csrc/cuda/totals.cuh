#pragma once

#include "block_sum.cuh"
#include "totals.h"

namespace ssp {

constexpr int kTotalsThreads = 256;
constexpr int kTotalsColumns = 16;  // of a block

__global__ void __launch_bounds__(kTotalsThreads) totals_kernel(const TotalsParams params) {
  SSP_DYN_SHARED(float, shared);
  const SumScratch scratch(shared, false, kTotalsColumns);
  const int64_t first = blockIdx.x * int64_t{kTotalsColumns};
  const int columns = static_cast<int>(min(int64_t{kTotalsColumns}, params.columns - first));
  const float* table = params.table + first;
  sum_columns<1>(
      static_cast<int>(params.rows), columns, scratch,
      [&](int row, int column, double* sums) { sums[0] += table[row * params.columns + column]; });
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    params.out[first + i] = static_cast<float>(scratch.totals[i]);
  }
}

inline void run_totals(const TotalsParams& params, cudaStream_t stream) {
  const int64_t blocks = (params.columns + kTotalsColumns - 1) / kTotalsColumns;
  SSP_LAUNCH(totals_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kTotalsThreads),
             SumScratch::bytes(false, kTotalsThreads, kTotalsColumns), stream, params);
}

}  // namespace ssp
