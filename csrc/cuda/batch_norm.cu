#include "batch_norm.cuh"

namespace ssp {

OnChipPlan plan_batch_norm(const BatchNormParams& params, const Extent& extent,
                           const Device& device) {
  return plan_batch_norm_on(params, extent, device);
}

cudaError_t launch_batch_norm(const BatchNormParams& params, const OnChipPlan& plan,
                              cudaStream_t stream) {
  run_batch_norm(params, plan, stream);
  return cudaGetLastError();
}

}  // namespace ssp
