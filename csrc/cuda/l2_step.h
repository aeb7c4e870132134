#pragma once

#include <cuda_runtime_api.h>

#include "operand.h"

namespace ssp {

// One attack step over `samples` of n elements each: dense tensors of one layout.
struct L2StepParams {
  Operand x_adv;
  Operand grad;
  Operand x;
  Operand out;
  int64_t samples;
  int64_t n;
  double step_size;
  double eps;
  double low;
  double high;
};

cudaError_t launch_l2_step(const L2StepParams& params, cudaStream_t stream);

}  // namespace ssp
