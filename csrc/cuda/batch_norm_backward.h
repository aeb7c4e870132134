#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "norm_backward.h"
#include "on_chip.h"

namespace ssp {

// reference.batch_norm_act_backward in one launch. sums.partials is scratch for
// plan.geometry.parts * C values.
struct BatchNormBackwardParams {
  NormGradient gradient;
  TermsParams extras;
  Operand z;  // z again; not wanted where data is null
  Operand du;
  GradientSums sums;
};

// Whether one launch can do it here, and how: all but params.sums is looked at.
OnChipPlan plan_batch_norm_backward(const BatchNormBackwardParams& params, const Extent& extent,
                                    const Device& device);

// `plan` must fit.
cudaError_t launch_batch_norm_backward(const BatchNormBackwardParams& params,
                                       const OnChipPlan& plan, cudaStream_t stream);

}  // namespace ssp
