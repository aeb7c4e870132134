#pragma once

#include "running_stats.h"
#include "unit.cuh"

namespace ssp {

constexpr int kRunningStatsThreads = 256;

// The running statistic as stored after each use: the dtype's rounding is part of the recurrence.
SSP_DEVICE void blend(const Operand& running, int64_t channel, float batch, float factor) {
  if (running.data == nullptr) return;
  const float value = (1 - factor) * value_at(running, channel) + factor * batch;
  switch (running.storage) {
    case Storage::kFloat:
      static_cast<float*>(running.data)[channel] = value;
      break;
    case Storage::kDouble:
      static_cast<double*>(running.data)[channel] = value;
      break;
    case Storage::kHalf:
      static_cast<__half*>(running.data)[channel] = __float2half_rn(value);
      break;
    default:
      static_cast<__nv_bfloat16*>(running.data)[channel] = __float2bfloat16_rn(value);
  }
}

// One block: each of its threads needs the count of uses before anyone moves it.
__global__ void __launch_bounds__(kRunningStatsThreads)
    running_stats_kernel(const RunningStatsParams params) {
  const int64_t tracked = params.tracked == nullptr ? 0 : *params.tracked;
  const float count = value_or(params.count_tensor, 0, static_cast<float>(params.count));
  const float correction = count / (count - 1);
  __syncthreads();
  if (params.tracked != nullptr && threadIdx.x == 0) *params.tracked = tracked + params.uses;
  if (!(count > 0)) return;
  for (int64_t c = threadIdx.x; c < params.channels; c += blockDim.x) {
    for (int64_t use = 0; use < params.uses; ++use) {
      const float factor = params.cumulative ? 1 / static_cast<float>(tracked + use + 1)
                                             : static_cast<float>(params.momentum);
      const int64_t i = use * params.channels + c;
      blend(params.running_mean, c, value_at(params.means, i), factor);
      blend(params.running_var, c, value_at(params.variances, i) * correction, factor);
    }
  }
}

inline void run_running_stats(const RunningStatsParams& params, cudaStream_t stream) {
  SSP_LAUNCH(running_stats_kernel, dim3(1), dim3(kRunningStatsThreads), 0, stream, params);
}

}  // namespace ssp
