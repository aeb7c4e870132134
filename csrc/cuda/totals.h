#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ssp {

// out[column] = the sum of a [rows, columns] table over its rows, in order.
struct TotalsParams {
  const float* table;
  int64_t rows;
  int64_t columns;
  float* out;
};

cudaError_t launch_totals(const TotalsParams& params, cudaStream_t stream);

}  // namespace ssp
