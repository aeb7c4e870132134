#include "group_norm_backward.cuh"

namespace ssp {

size_t group_norm_backward_shared(const Extent& extent, int num_groups) {
  return group_norm_backward_shared_of(group_geometry(extent, num_groups));
}

cudaError_t launch_group_norm_backward(const GroupNormBackwardParams& params, const Device& device,
                                       cudaStream_t stream) {
  run_group_norm_backward(params, device, stream);
  return cudaGetLastError();
}

}  // namespace ssp
