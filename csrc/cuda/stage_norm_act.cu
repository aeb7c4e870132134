#include "stage_norm_act.cuh"

namespace ssp {

cudaError_t launch_stage_norm_act(const StageNormActParams& params, const Device& device,
                                  cudaStream_t stream) {
  run_stage_norm_act(params, device, stream);
  return cudaGetLastError();
}

}  // namespace ssp
