#include "stage_dots.cuh"

namespace ssp {

int stage_dots_blocks(int64_t n, const Device& device) { return stage_dots_blocks_on(n, device); }

cudaError_t launch_stage_dots(const StageDotsParams& params, cudaStream_t stream) {
  run_stage_dots(params, stream);
  return cudaGetLastError();
}

}  // namespace ssp
