// The CUDA ops: checks, allocation, device and stream; the kernels know none of it.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "../layout.h"
#include "linf_step.h"

namespace ssp {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

std::string device_of(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another kind";
}

void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x_adv) {
  STD_TORCH_CHECK(same_shape(tensor, x_adv), op, ": ", name, " must have x_adv's shape ",
                  shape_of(x_adv), ", but has ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.scalar_type() == x_adv.scalar_type(), op, ": ", name,
                  " must have x_adv's dtype ", x_adv.scalar_type(), ", but has ",
                  tensor.scalar_type());
  STD_TORCH_CHECK(device_of(tensor) == device_of(x_adv), op, ": ", name,
                  " must be on x_adv's device ", device_of(x_adv), ", but is on ",
                  device_of(tensor));
}

using LinfStepLauncher = cudaError_t (*)(const LinfStepParams&, cudaStream_t);

LinfStepLauncher linf_step_launcher(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return launch_linf_step<float>;
    case ScalarType::Double:
      return launch_linf_step<double>;
    case ScalarType::Half:
      return launch_linf_step<__half>;
    case ScalarType::BFloat16:
      return launch_linf_step<__nv_bfloat16>;
    default:
      return nullptr;
  }
}

// reference.linf_step
Tensor linf_step_cuda(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size,
                      double eps, double low, double high) {
  STD_TORCH_CHECK(x_adv.is_cuda(), "linf_step: x_adv must be on a CUDA device, as grad or x is");
  check_like("linf_step", "grad", grad, x_adv);
  check_like("linf_step", "x", x, x_adv);
  const LinfStepLauncher launch = linf_step_launcher(x_adv.scalar_type());
  STD_TORCH_CHECK(launch != nullptr,
                  "linf_step: x_adv must be float32, float64, float16 or bfloat16, but is ",
                  x_adv.scalar_type());
  const torch::stable::accelerator::DeviceGuard guard(x_adv.get_device_index());
  const bool rows = is_rows(x_adv);
  const Tensor out = empty_like(x_adv, rows);
  if (out.numel() == 0) return out;
  const Tensor dense_adv = dense(x_adv, rows);
  const Tensor dense_grad = dense(grad, rows);
  const Tensor dense_x = dense(x, rows);
  const LinfStepParams params{dense_adv.const_data_ptr(),
                              dense_grad.const_data_ptr(),
                              dense_x.const_data_ptr(),
                              out.mutable_data_ptr(),
                              out.numel(),
                              step_size,
                              eps,
                              low,
                              high};
  STD_CUDA_CHECK(launch(params, current_stream(x_adv)));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ssp_fused, CUDA, m) { m.impl("linf_step", TORCH_BOX(&linf_step_cuda)); }

}  // namespace
}  // namespace ssp
