#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "geometry.h"
#include "operand.h"

namespace ssp {

// reference.channel_sum, but for the last step: `partials` are [geometry.parts, C].
struct ChannelSumParams {
  Operand g;
  Geometry geometry;
  float* partials;
};

Geometry channel_sum_geometry(const Extent& extent, const Device& device);
cudaError_t launch_channel_sum(const ChannelSumParams& params, cudaStream_t stream);

}  // namespace ssp
