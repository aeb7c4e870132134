#include "l2_step.cuh"

namespace ssp {

cudaError_t launch_l2_step(const L2StepParams& params, cudaStream_t stream) {
  run_l2_step(params, stream);
  return cudaGetLastError();
}

}  // namespace ssp
