#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "geometry.h"
#include "norm_backward.h"
#include "operand.h"

namespace ssp {

// Sums over one sample of a channel; `own` is that of du before the extras.
struct SampleSums {
  float* dgamma;
  float* dbeta;
  float* own;
};

// reference.group_norm_act_backward, but for the sums over samples: `sums` are [N, C] each.
// gradient.mean and gradient.rstd are [N, num_groups].
struct GroupNormBackwardParams {
  NormGradient gradient;
  Operand channel_bias;
  Extent extent;
  int num_groups = 1;
  TermsParams extras;
  Operand z;  // z again; not wanted where data is null
  Operand du;
  SampleSums sums;
};

// Shared memory that a block cannot do without: more than the device has cannot be launched.
size_t group_norm_backward_shared(const Extent& extent, int num_groups);

cudaError_t launch_group_norm_backward(const GroupNormBackwardParams& params, const Device& device,
                                       cudaStream_t stream);

}  // namespace ssp
