// reference.norm_act_backward_reduce and norm_act_backward.

#include "gradient_ops.h"

namespace ssp {

GradientArguments::GradientArguments(const char* op_name, const Tensor& dz, double scale,
                                     const OptionalTensor& scale_tensor, bool rows,
                                     int64_t activation)
    : op(op_name), guard(op, "dz", dz), operands(op), like(dz) {
  check_activation(op, "dz", dz);
  check_activation_code(op, activation);
  extent = checked_extent(op, dz, rows);
  params.dz = operands.activation("dz", dz, rows);
  params.scale = static_cast<float>(scale);
  params.scale_tensor = operands.number("scale_tensor", scale_tensor);
  params.activation = static_cast<int>(activation);
}

GradientArguments::GradientArguments(const char* op_name, const Tensor& dz, double scale,
                                     const OptionalTensor& scale_tensor, const Tensor& u,
                                     int64_t activation)
    : GradientArguments(op_name, dz, scale, scale_tensor, is_rows(u), activation) {
  check_activation(op, "u", u);
  check_dz(op, dz, u);
  params.u = operands.activation("u", u, extent.rows);
}

void GradientArguments::set_statistics(const OptionalTensor& mean, const Tensor& rstd,
                                       const std::vector<int64_t>& shape,
                                       const OptionalTensor& gamma, const OptionalTensor& beta) {
  params.mean = operands.vector("mean", mean, shape);
  params.rstd = operands.vector("rstd", rstd, shape);
  params.gamma = operands.vector("gamma", gamma, {extent.c});
  params.beta = operands.vector("beta", beta, {extent.c});
}

TermsParams GradientArguments::extras(const std::vector<Tensor>& extras,
                                      const Coefficients& coefficients,
                                      const OptionalTensor& tensor, ScalarType du_dtype) {
  check_operands(op, "extras", extras.size(), 0, kMaxTerms);
  for (const Tensor& extra : extras) {
    check_mixture(op, "extras", extra.scalar_type(), "du", du_dtype);
  }
  return operands.terms("extras", extras, like, extent.rows, "extra_coefficients", coefficients,
                        tensor);
}

Tensor GradientArguments::empty_like(ScalarType dtype) const {
  return empty(like, shape_vector(like), extent.rows, dtype);
}

Tensor GradientArguments::make_z(bool wanted) {
  if (!wanted) return unwanted(like, like.scalar_type());
  const Tensor again = empty_like(like.scalar_type());
  z = operands.result(again);
  return again;
}

Tensors<3> norm_act_backward_reduce(const Tensor& dz, double scale,
                                    const OptionalTensor& scale_tensor, const Tensor& u,
                                    const Tensor& mean, const Tensor& rstd,
                                    const OptionalTensor& gamma, const OptionalTensor& beta,
                                    int64_t activation, bool write_z) {
  GradientArguments arguments("norm_act_backward_reduce", dz, scale, scale_tensor, u, activation);
  const int64_t c = arguments.extent.c;
  arguments.set_statistics(mean, rstd, {c}, gamma, beta);
  const Tensor z = arguments.make_z(write_z);
  if (dz.numel() == 0) return {filled_vector(u, {c}, 0), filled_vector(u, {c}, 0), z};
  const Tensor sum_dy = empty_vector(u, {c});
  const Tensor sum_dy_xhat = empty_vector(u, {c});
  NormReduceParams params;
  params.gradient = arguments.params;
  params.z = arguments.z;
  params.geometry = norm_reduce_geometry(merged_extent(arguments.extent), arguments.guard.device());
  const Tensor partials = empty_vector(u, {params.geometry.parts, c, 2});
  params.sums = {static_cast<SumPartial*>(partials.mutable_data_ptr()), floats(sum_dy),
                 floats(sum_dy_xhat)};
  check_launch(arguments.op, launch_norm_reduce(params, arguments.guard.stream()));
  return {sum_dy, sum_dy_xhat, z};
}

Tensor norm_act_backward(const Tensor& dz, double scale, const OptionalTensor& scale_tensor,
                         const OptionalTensor& u, const OptionalTensor& mask,
                         const OptionalTensor& mean, const Tensor& rstd,
                         const OptionalTensor& gamma, const OptionalTensor& beta,
                         int64_t activation, const OptionalTensor& sum_dy,
                         const OptionalTensor& sum_dy_xhat, double count,
                         const OptionalTensor& count_tensor, const std::vector<Tensor>& extras,
                         const Coefficients& extra_coefficients,
                         const OptionalTensor& extra_coefficient_tensor,
                         const OptionalDtype& du_dtype) {
  const char* op = "norm_act_backward";
  check_norm_backward(op, u, mask, mean, activation, sum_dy, sum_dy_xhat);
  const bool rows = mask.has_value() ? mask->dim() == 2 : is_rows(dz);
  GradientArguments arguments =
      u.has_value() ? GradientArguments(op, dz, scale, scale_tensor, *u, activation)
                    : GradientArguments(op, dz, scale, scale_tensor, rows, activation);
  const ScalarType dtype =
      result_dtype(op, "du_dtype", du_dtype, u.has_value() ? u->scalar_type() : dz.scalar_type());
  const int64_t c = arguments.extent.c;
  arguments.set_statistics(mean, rstd, {c}, gamma, beta);
  const Tensor du = arguments.empty_like(dtype);
  NormBackwardParams params;
  params.gradient = arguments.params;
  Tensor bits;
  if (mask.has_value()) {
    check_mask(op, *mask, arguments.extent);
    bits = torch::stable::contiguous(*mask);
    params.mask = static_cast<const uint8_t*>(bits.const_data_ptr());
  }
  params.sum_dy = arguments.operands.vector("sum_dy", sum_dy, {c});
  params.sum_dy_xhat = arguments.operands.vector("sum_dy_xhat", sum_dy_xhat, {c});
  params.count = count;
  params.count_tensor = arguments.operands.number("count_tensor", count_tensor);
  params.extras = arguments.extras(extras, extra_coefficients, extra_coefficient_tensor, dtype);
  params.du = arguments.operands.result(du);
  if (du.numel() == 0) return du;
  params.geometry =
      norm_backward_geometry(mask.has_value() ? arguments.extent : merged_extent(arguments.extent),
                             arguments.guard.device());
  check_launch(op, launch_norm_backward(params, arguments.guard.stream()));
  return du;
}

}  // namespace ssp
