#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "geometry.h"
#include "moments.h"
#include "on_chip.h"
#include "operand.h"

namespace ssp {

// reference.stage_batch_norm_act in one launch. statistics.partials is scratch for
// plan.geometry.parts * C values.
struct BatchNormParams {
  StageParams stage;
  Operand gamma;
  Operand beta;
  int activation = 0;
  Operand z;
  BatchStatistics statistics;
};

// Whether one launch can do it here, and how: all but params.statistics is looked at.
OnChipPlan plan_batch_norm(const BatchNormParams& params, const Extent& extent,
                           const Device& device);

// `plan` must fit.
cudaError_t launch_batch_norm(const BatchNormParams& params, const OnChipPlan& plan,
                              cudaStream_t stream);

}  // namespace ssp
