// reference.stage_batch_norm_act and batch_norm_act_backward: in one launch where the tensors stay
// on chip, else in two.

#include "../math/normalize.h"
#include "batch_norm.h"
#include "batch_norm_backward.h"
#include "gradient_ops.h"
#include "stage_moments.h"
#include "stage_norm_act.h"
#include "stage_ops.h"

namespace ssp {
namespace {

// Moments, then normalization of u as stored; of its only term, where u is written nowhere.
void batch_norm_in_two(StageArguments& arguments, BatchNormParams& one, bool is_written) {
  const int64_t c = arguments.extent.c;
  Tensor scratch;
  if (!is_written && one.stage.sum.count > 1) {
    scratch = arguments.empty_like(arguments.dtype);
    one.stage.u.data = scratch.mutable_data_ptr();
  }
  const Extent extent = merged_extent(arguments.extent);
  StageMomentsParams moments;
  moments.stage = one.stage;
  moments.geometry = stage_moments_geometry(extent, arguments.guard.device());
  moments.statistics = one.statistics;
  const Tensor partials = arguments.vector({moments.geometry.parts, c, 2});
  moments.statistics.partials = static_cast<MomentPartial*>(partials.mutable_data_ptr());
  check_launch(arguments.op, launch_stage_moments_partials(moments, arguments.guard.stream()));

  StageNormActParams apply;
  apply.stage = one.stage;
  if (one.stage.u.data != nullptr) {
    apply.stage.sum = TermsParams{};
    apply.stage.sum.terms[0] = one.stage.u;
    apply.stage.sum.coefficients[0] = 1;
    apply.stage.sum.count = 1;
    apply.stage.channel_bias = {};
    apply.stage.u.data = nullptr;
  }
  apply.extent = extent;
  apply.gamma = one.gamma;
  apply.beta = one.beta;
  apply.activation = one.activation;
  apply.z = one.z;
  apply.batch = moments.statistics;
  apply.batch_geometry = moments.geometry;
  check_launch(arguments.op,
               launch_stage_norm_act(apply, arguments.guard.device(), arguments.guard.stream()));
}

}  // namespace

Tensors<5> stage_batch_norm_act(const std::vector<Tensor>& terms, const Coefficients& coefficients,
                                const OptionalTensor& coefficient_tensor,
                                const OptionalTensor& channel_bias, const OptionalTensor& gamma,
                                const OptionalTensor& beta, double eps, int64_t activation,
                                const OptionalDtype& z_dtype, bool write_u) {
  StageArguments arguments("stage_batch_norm_act", terms, coefficients, coefficient_tensor,
                           channel_bias);
  const char* op = arguments.op;
  check_activation_code(op, activation);
  check_eps(op, eps);
  const int64_t c = arguments.extent.c;
  const Tensor u = arguments.make_u(write_u);
  const Tensor z = arguments.empty_like(result_dtype(op, "z_dtype", z_dtype, arguments.dtype));
  BatchNormParams params;
  params.stage = arguments.params;
  params.gamma = arguments.operands.vector("gamma", gamma, {c});
  params.beta = arguments.operands.vector("beta", beta, {c});
  params.activation = static_cast<int>(activation);
  params.z = arguments.operands.result(z);
  if (z.numel() == 0) {
    return {u, z, filled_vector(z, {c}, 0), filled_vector(z, {c}, 0),
            filled_vector(z, {c}, reciprocal_deviation(0.0, eps))};
  }
  const Tensor mean = arguments.vector({c});
  const Tensor variance = arguments.vector({c});
  const Tensor rstd = arguments.vector({c});
  params.statistics.eps = eps;
  params.statistics.mean = floats(mean);
  params.statistics.variance = floats(variance);
  params.statistics.rstd = floats(rstd);
  const OnChipPlan plan =
      plan_batch_norm(params, merged_extent(arguments.extent), arguments.guard.device());
  if (plan.fits) {
    const Tensor partials = arguments.vector({plan.geometry.parts, c, 2});
    params.statistics.partials = static_cast<MomentPartial*>(partials.mutable_data_ptr());
    check_launch(op, launch_batch_norm(params, plan, arguments.guard.stream()));
  } else {
    batch_norm_in_two(arguments, params, write_u);
  }
  return {u, z, mean, variance, rstd};
}

Tensors<4> batch_norm_act_backward(const Tensor& dz, double scale,
                                   const OptionalTensor& scale_tensor, const Tensor& u,
                                   const Tensor& mean, const Tensor& rstd,
                                   const OptionalTensor& gamma, const OptionalTensor& beta,
                                   int64_t activation, const std::vector<Tensor>& extras,
                                   const Coefficients& extra_coefficients,
                                   const OptionalTensor& extra_coefficient_tensor, bool write_z) {
  GradientArguments arguments("batch_norm_act_backward", dz, scale, scale_tensor, u, activation);
  const char* op = arguments.op;
  const int64_t c = arguments.extent.c;
  arguments.set_statistics(mean, rstd, {c}, gamma, beta);
  const Tensor z = arguments.make_z(write_z);
  const Tensor du = arguments.empty_like(u.scalar_type());
  BatchNormBackwardParams params;
  params.gradient = arguments.params;
  params.extras =
      arguments.extras(extras, extra_coefficients, extra_coefficient_tensor, u.scalar_type());
  params.z = arguments.z;
  params.du = arguments.operands.result(du);
  if (du.numel() == 0) return {du, filled_vector(u, {c}, 0), filled_vector(u, {c}, 0), z};
  const Tensor sum_dy = empty_vector(u, {c});
  const Tensor sum_dy_xhat = empty_vector(u, {c});
  params.sums.dy = floats(sum_dy);
  params.sums.dy_xhat = floats(sum_dy_xhat);

  const Device device = arguments.guard.device();
  const cudaStream_t stream = arguments.guard.stream();
  const Extent extent = merged_extent(arguments.extent);
  const OnChipPlan plan = plan_batch_norm_backward(params, extent, device);
  const Geometry geometry = plan.fits ? plan.geometry : norm_reduce_geometry(extent, device);
  const Tensor partials = empty_vector(u, {geometry.parts, c, 2});
  params.sums.partials = static_cast<SumPartial*>(partials.mutable_data_ptr());
  if (plan.fits) {
    check_launch(op, launch_batch_norm_backward(params, plan, stream));
    return {du, sum_dy, sum_dy_xhat, z};
  }
  NormReduceParams reduce;
  reduce.gradient = params.gradient;
  reduce.z = params.z;
  reduce.geometry = geometry;
  reduce.sums = params.sums;
  check_launch(op, launch_norm_reduce_partials(reduce, stream));
  NormBackwardParams apply;
  apply.gradient = params.gradient;
  apply.count = static_cast<double>(extent.per_channel());
  apply.extras = params.extras;
  apply.du = params.du;
  apply.geometry = geometry;
  apply.sums = params.sums;
  check_launch(op, launch_norm_backward(apply, stream));
  return {du, sum_dy, sum_dy_xhat, z};
}

}  // namespace ssp
