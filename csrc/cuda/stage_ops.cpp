// reference.stage_combine, stage_moments and stage_norm_act.

#include "stage_ops.h"

#include "stage_moments.h"
#include "stage_norm_act.h"

namespace ssp {
namespace {

const Tensor& first_of(const char* op, const std::vector<Tensor>& terms) {
  check_operands(op, "terms", terms.size(), 1, kMaxTerms);
  return terms[0];
}

}  // namespace

StageArguments::StageArguments(const char* op_name, const std::vector<Tensor>& terms,
                               const Coefficients& coefficients,
                               const OptionalTensor& coefficient_tensor,
                               const OptionalTensor& channel_bias)
    : op(op_name), guard(op, "terms", first_of(op, terms)), operands(op), like(terms[0]) {
  check_activation(op, "terms", like);
  dtype = stage_dtype(op, terms);
  extent = checked_extent(op, like, common_rows(terms));
  params.sum = operands.terms("terms", terms, like, extent.rows, "coefficients", coefficients,
                              coefficient_tensor);
  params.channel_bias = operands.vector("channel_bias", channel_bias, {extent.c});
  params.u.storage = storage_of(op, "terms", dtype);
}

Tensor StageArguments::empty_like(ScalarType result_dtype) const {
  return empty(like, shape_vector(like), extent.rows, result_dtype);
}

Tensor StageArguments::make_u(bool wanted) {
  if (!wanted) return unwanted(like, dtype);
  const Tensor u = empty_like(dtype);
  params.u.data = u.mutable_data_ptr();
  return u;
}

Tensor stage_combine(const std::vector<Tensor>& terms, const Coefficients& coefficients,
                     const OptionalTensor& coefficient_tensor, const OptionalTensor& channel_bias) {
  StageArguments arguments("stage_combine", terms, coefficients, coefficient_tensor, channel_bias);
  const Tensor u = arguments.make_u(true);
  if (u.numel() == 0) return u;
  StageNormActParams params;
  params.stage = arguments.params;
  params.extent = merged_extent(arguments.extent);
  check_launch(arguments.op,
               launch_stage_norm_act(params, arguments.guard.device(), arguments.guard.stream()));
  return u;
}

Tensors<3> stage_moments(const std::vector<Tensor>& terms, const Coefficients& coefficients,
                         const OptionalTensor& coefficient_tensor,
                         const OptionalTensor& channel_bias, bool write_u) {
  StageArguments arguments("stage_moments", terms, coefficients, coefficient_tensor, channel_bias);
  const int64_t c = arguments.extent.c;
  const Tensor u = arguments.make_u(write_u);
  if (arguments.extent.numel() == 0) {
    return {u, filled_vector(u, {c}, 0), filled_vector(u, {c}, 0)};
  }
  const Tensor mean = arguments.vector({c});
  const Tensor variance = arguments.vector({c});
  StageMomentsParams params;
  params.stage = arguments.params;
  params.geometry =
      stage_moments_geometry(merged_extent(arguments.extent), arguments.guard.device());
  const Tensor partials = arguments.vector({params.geometry.parts, c, 2});
  params.statistics.partials = static_cast<MomentPartial*>(partials.mutable_data_ptr());
  params.statistics.mean = floats(mean);
  params.statistics.variance = floats(variance);
  check_launch(arguments.op, launch_stage_moments(params, arguments.guard.stream()));
  return {u, mean, variance};
}

Tensors<3> stage_norm_act(const std::vector<Tensor>& terms, const Coefficients& coefficients,
                          const OptionalTensor& coefficient_tensor,
                          const OptionalTensor& channel_bias, const Tensor& mean,
                          const Tensor& rstd, const OptionalTensor& gamma,
                          const OptionalTensor& beta, int64_t activation,
                          const OptionalDtype& z_dtype, bool write_u, bool write_mask) {
  StageArguments arguments("stage_norm_act", terms, coefficients, coefficient_tensor, channel_bias);
  const char* op = arguments.op;
  check_activation_code(op, activation);
  Operands& operands = arguments.operands;
  const int64_t c = arguments.extent.c;
  const Tensor u = arguments.make_u(write_u);
  const Tensor z = arguments.empty_like(result_dtype(op, "z_dtype", z_dtype, arguments.dtype));
  const Tensor mask = write_mask ? empty(z, mask_shape(arguments.extent), false, ScalarType::Byte)
                                 : unwanted(z, ScalarType::Byte);
  StageNormActParams params;
  params.stage = arguments.params;
  params.extent = write_mask ? arguments.extent : merged_extent(arguments.extent);
  params.mean = operands.vector("mean", mean, {c});
  params.rstd = operands.vector("rstd", rstd, {c});
  params.gamma = operands.vector("gamma", gamma, {c});
  params.beta = operands.vector("beta", beta, {c});
  params.activation = static_cast<int>(activation);
  params.z = operands.result(z);
  if (write_mask) params.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  if (z.numel() > 0) {
    check_launch(op,
                 launch_stage_norm_act(params, arguments.guard.device(), arguments.guard.stream()));
  }
  return {u, z, mask};
}

}  // namespace ssp
