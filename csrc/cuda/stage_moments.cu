#include "stage_moments.cuh"

namespace ssp {

Geometry stage_moments_geometry(const Extent& extent, const Device& device) {
  return stage_moments_geometry_on(extent, device);
}

cudaError_t launch_stage_moments_partials(const StageMomentsParams& params, cudaStream_t stream) {
  run_stage_moments_partials(params, stream);
  return cudaGetLastError();
}

cudaError_t launch_stage_moments(const StageMomentsParams& params, cudaStream_t stream) {
  run_stage_moments(params, stream);
  return cudaGetLastError();
}

}  // namespace ssp
