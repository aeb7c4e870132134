#include "totals.cuh"

namespace ssp {

cudaError_t launch_totals(const TotalsParams& params, cudaStream_t stream) {
  run_totals(params, stream);
  return cudaGetLastError();
}

}  // namespace ssp
