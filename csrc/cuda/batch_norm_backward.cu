#include "batch_norm_backward.cuh"

namespace ssp {

OnChipPlan plan_batch_norm_backward(const BatchNormBackwardParams& params, const Extent& extent,
                                    const Device& device) {
  return plan_batch_norm_backward_on(params, extent, device);
}

cudaError_t launch_batch_norm_backward(const BatchNormBackwardParams& params,
                                       const OnChipPlan& plan, cudaStream_t stream) {
  run_batch_norm_backward(params, plan, stream);
  return cudaGetLastError();
}

}  // namespace ssp
