// reference.linf_step and l2_step.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../ops.h"
#include "l2_step.h"
#include "linf_step.h"
#include "tensors.h"

namespace ssp {
namespace {

using LinfStepLauncher = cudaError_t (*)(const LinfStepParams&, cudaStream_t);

LinfStepLauncher linf_step_launcher(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return launch_linf_step<float>;
    case ScalarType::Double:
      return launch_linf_step<double>;
    case ScalarType::Half:
      return launch_linf_step<__half>;
    default:
      return launch_linf_step<__nv_bfloat16>;
  }
}

// Raises unless `tensor` has the shape and dtype of x_adv.
void check_step_operand(const char* op, const char* name, const Tensor& tensor,
                        const Tensor& x_adv) {
  check_shape(op, name, tensor, shape_vector(x_adv));
  SSP_CHECK(tensor.scalar_type() == x_adv.scalar_type(), op, ": ", name,
            " must have x_adv's dtype ", x_adv.scalar_type(), ", but has ", tensor.scalar_type());
}

}  // namespace

Tensor linf_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size,
                 double eps, double low, double high) {
  const char* op = "linf_step";
  const DeviceGuard guard(op, "x_adv", x_adv);
  for (const auto& [name, tensor] : {std::pair{"x_adv", &x_adv}, {"grad", &grad}, {"x", &x}}) {
    check_step_operand(op, name, *tensor, x_adv);
  }
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
  check_launch(op, linf_step_launcher(x_adv.scalar_type())(params, guard.stream()));
  return out;
}

Tensor l2_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size,
               double eps, double low, double high) {
  const char* op = "l2_step";
  const DeviceGuard guard(op, "x_adv", x_adv);
  check_activation(op, "x_adv", x_adv);
  const bool rows = is_rows(x_adv);
  Operands operands(op);
  const auto operand = [&](const char* name, const Tensor& tensor) {
    check_step_operand(op, name, tensor, x_adv);
    return operands.activation(name, tensor, rows);
  };
  L2StepParams params{};
  params.x_adv = operand("x_adv", x_adv);
  params.grad = operand("grad", grad);
  params.x = operand("x", x);
  const Tensor out = empty_like(x_adv, rows);
  if (out.numel() == 0) return out;
  params.out = operands.result(out);
  params.samples = x_adv.size(0);
  params.n = x_adv.numel() / params.samples;
  params.step_size = step_size;
  params.eps = eps;
  params.low = low;
  params.high = high;
  check_launch(op, launch_l2_step(params, guard.stream()));
  return out;
}

}  // namespace ssp
