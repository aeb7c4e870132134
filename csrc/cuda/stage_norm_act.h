#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "geometry.h"
#include "moments.h"
#include "operand.h"

namespace ssp {

// reference.stage_norm_act, and stage_combine where z.data is null. The statistics are given in
// `mean` and `rstd`, or, where batch.partials is not null, merged from those that stage_moments
// left with the same geometry.
struct StageNormActParams {
  StageParams stage;
  Extent extent;
  Operand mean;
  Operand rstd;
  Operand gamma;
  Operand beta;
  int activation = 0;
  Operand z;
  uint8_t* mask = nullptr;  // not wanted where null
  BatchStatistics batch;
  Geometry batch_geometry;
};

cudaError_t launch_stage_norm_act(const StageNormActParams& params, const Device& device,
                                  cudaStream_t stream);

}  // namespace ssp
