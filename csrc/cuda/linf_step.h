#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ssp {

// One attack step over n elements: dense tensors of one layout, so that only their order counts.
struct LinfStepParams {
  const void* x_adv;
  const void* grad;
  const void* x;
  void* out;
  int64_t n;
  double step_size;
  double eps;
  double low;
  double high;
};

// Launches on `stream`, on the current device. T: float, double, __half, __nv_bfloat16.
template <class T>
cudaError_t launch_linf_step(const LinfStepParams& params, cudaStream_t stream);

}  // namespace ssp
