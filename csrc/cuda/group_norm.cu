#include "group_norm.cuh"

namespace ssp {

size_t group_norm_shared(const Extent& extent, int num_groups) {
  return group_norm_shared_of(group_geometry(extent, num_groups));
}

cudaError_t launch_group_norm(const GroupNormParams& params, const Device& device,
                              cudaStream_t stream) {
  run_group_norm(params, device, stream);
  return cudaGetLastError();
}

}  // namespace ssp
