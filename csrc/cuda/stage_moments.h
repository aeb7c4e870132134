#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "geometry.h"
#include "moments.h"
#include "operand.h"

namespace ssp {

// reference.stage_moments. statistics.partials is scratch for geometry.parts * C values.
struct StageMomentsParams {
  StageParams stage;
  Geometry geometry;
  BatchStatistics statistics;
};

Geometry stage_moments_geometry(const Extent& extent, const Device& device);

// Partial moments alone: what launch_stage_norm_act merges.
cudaError_t launch_stage_moments_partials(const StageMomentsParams& params, cudaStream_t stream);
// Partial moments, merged and written.
cudaError_t launch_stage_moments(const StageMomentsParams& params, cudaStream_t stream);

}  // namespace ssp
