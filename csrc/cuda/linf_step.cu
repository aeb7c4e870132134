#include "linf_step.cuh"

namespace ssp {

template <class T>
cudaError_t launch_linf_step(const LinfStepParams& params, cudaStream_t stream) {
  run_linf_step<T>(params, stream);
  return cudaGetLastError();
}

template cudaError_t launch_linf_step<float>(const LinfStepParams&, cudaStream_t);
template cudaError_t launch_linf_step<double>(const LinfStepParams&, cudaStream_t);
template cudaError_t launch_linf_step<__half>(const LinfStepParams&, cudaStream_t);
template cudaError_t launch_linf_step<__nv_bfloat16>(const LinfStepParams&, cudaStream_t);

}  // namespace ssp
