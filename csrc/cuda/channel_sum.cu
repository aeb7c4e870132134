#include "channel_sum.cuh"

namespace ssp {

Geometry channel_sum_geometry(const Extent& extent, const Device& device) {
  return channel_sum_geometry_on(extent, device);
}

cudaError_t launch_channel_sum(const ChannelSumParams& params, cudaStream_t stream) {
  run_channel_sum(params, stream);
  return cudaGetLastError();
}

}  // namespace ssp
