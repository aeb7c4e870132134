#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "geometry.h"
#include "operand.h"

namespace ssp {

// reference.stage_group_norm_act; mean and rstd are [N, num_groups].
struct GroupNormParams {
  StageParams stage;
  Extent extent;
  int num_groups = 1;
  Operand gamma;
  Operand beta;
  double eps = 0;
  int activation = 0;
  Operand z;
  float* mean = nullptr;
  float* rstd = nullptr;
};

// Shared memory that a block cannot do without: more than the device has cannot be launched.
size_t group_norm_shared(const Extent& extent, int num_groups);

cudaError_t launch_group_norm(const GroupNormParams& params, const Device& device,
                              cudaStream_t stream);

}  // namespace ssp
