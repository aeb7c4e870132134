#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "operand.h"

namespace ssp {

// reference.stage_dots over n elements of dense tensors of one layout, but for the last step:
// `partials` are [blocks, count].
struct StageDotsParams {
  Operand g;
  Operand terms[kMaxTerms];
  int count;
  int64_t n;
  int blocks;
  float* partials;
};

int stage_dots_blocks(int64_t n, const Device& device);
cudaError_t launch_stage_dots(const StageDotsParams& params, cudaStream_t stream);

}  // namespace ssp
