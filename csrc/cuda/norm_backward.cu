#include "norm_backward.cuh"

namespace ssp {

Geometry norm_reduce_geometry(const Extent& extent, const Device& device) {
  return norm_reduce_geometry_on(extent, device);
}

Geometry norm_backward_geometry(const Extent& extent, const Device& device) {
  return norm_backward_geometry_on(extent, device);
}

cudaError_t launch_norm_reduce_partials(const NormReduceParams& params, cudaStream_t stream) {
  run_norm_reduce_partials(params, stream);
  return cudaGetLastError();
}

cudaError_t launch_norm_reduce(const NormReduceParams& params, cudaStream_t stream) {
  run_norm_reduce(params, stream);
  return cudaGetLastError();
}

cudaError_t launch_norm_backward(const NormBackwardParams& params, cudaStream_t stream) {
  run_norm_backward(params, stream);
  return cudaGetLastError();
}

}  // namespace ssp
