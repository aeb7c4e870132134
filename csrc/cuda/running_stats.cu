#include "running_stats.cuh"

namespace ssp {

cudaError_t launch_running_stats(const RunningStatsParams& params, cudaStream_t stream) {
  run_running_stats(params, stream);
  return cudaGetLastError();
}

}  // namespace ssp
