// reference.stage_group_norm_act and group_norm_act_backward.

#include "../math/normalize.h"
#include "gradient_ops.h"
#include "group_norm.h"
#include "group_norm_backward.h"
#include "stage_ops.h"
#include "totals.h"

namespace ssp {
namespace {

// A block holds tables over the channels of a group (in channels last of several).
void check_group_size(const char* op, const Extent& extent, int64_t num_groups, size_t needed,
                      const Device& device) {
  SSP_CHECK(needed <= static_cast<size_t>(device.shared_bytes) &&
                (!extent.rows || group_geometry(extent, num_groups).active > 0),
            op, ": a group has too many channels for a GPU's block: ", extent.c, " in ", num_groups,
            " groups");
}

}  // namespace

Tensors<4> stage_group_norm_act(const std::vector<Tensor>& terms, const Coefficients& coefficients,
                                const OptionalTensor& coefficient_tensor,
                                const OptionalTensor& channel_bias, int64_t num_groups,
                                const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                                int64_t activation, const OptionalDtype& z_dtype, bool write_u) {
  StageArguments arguments("stage_group_norm_act", terms, coefficients, coefficient_tensor,
                           channel_bias);
  const char* op = arguments.op;
  check_activation_code(op, activation);
  check_eps(op, eps);
  const Extent extent = merged_extent(arguments.extent);
  check_groups(op, num_groups, extent.c);
  const Tensor u = arguments.make_u(write_u);
  const Tensor z = arguments.empty_like(result_dtype(op, "z_dtype", z_dtype, arguments.dtype));
  GroupNormParams params;
  params.stage = arguments.params;
  params.extent = extent;
  params.num_groups = static_cast<int>(num_groups);
  params.gamma = arguments.operands.vector("gamma", gamma, {extent.c});
  params.beta = arguments.operands.vector("beta", beta, {extent.c});
  params.eps = eps;
  params.activation = static_cast<int>(activation);
  params.z = arguments.operands.result(z);
  const std::vector<int64_t> shape = {extent.n, num_groups};
  if (z.numel() == 0) {
    return {u, z, filled_vector(z, shape, 0),
            filled_vector(z, shape, reciprocal_deviation(0.0, eps))};
  }
  const Device device = arguments.guard.device();
  check_group_size(op, extent, num_groups, group_norm_shared(extent, params.num_groups), device);
  const Tensor mean = arguments.vector(shape);
  const Tensor rstd = arguments.vector(shape);
  params.mean = floats(mean);
  params.rstd = floats(rstd);
  check_launch(op, launch_group_norm(params, device, arguments.guard.stream()));
  return {u, z, mean, rstd};
}

Tensors<5> group_norm_act_backward(const Tensor& dz, double scale,
                                   const OptionalTensor& scale_tensor, const Tensor& u,
                                   const OptionalTensor& channel_bias, const Tensor& mean,
                                   const Tensor& rstd, const OptionalTensor& gamma,
                                   const OptionalTensor& beta, int64_t activation,
                                   const std::vector<Tensor>& extras,
                                   const Coefficients& extra_coefficients,
                                   const OptionalTensor& extra_coefficient_tensor, bool write_z) {
  GradientArguments arguments("group_norm_act_backward", dz, scale, scale_tensor, u, activation);
  const char* op = arguments.op;
  const Extent extent = merged_extent(arguments.extent);
  SSP_CHECK(mean.dim() == 2, op, ": mean must have the shape [N, num_groups], but has ",
            shape_of(mean));
  const int64_t num_groups = mean.size(1);
  check_groups(op, num_groups, extent.c);
  arguments.set_statistics(mean, rstd, {extent.n, num_groups}, gamma, beta);
  const Tensor z = arguments.make_z(write_z);
  const Tensor du = arguments.empty_like(u.scalar_type());
  GroupNormBackwardParams params;
  params.gradient = arguments.params;
  params.channel_bias = arguments.operands.vector("channel_bias", channel_bias, {extent.c});
  params.extent = extent;
  params.num_groups = static_cast<int>(num_groups);
  params.extras =
      arguments.extras(extras, extra_coefficients, extra_coefficient_tensor, u.scalar_type());
  params.z = arguments.z;
  params.du = arguments.operands.result(du);
  const std::vector<int64_t> shape = {extent.c};
  if (du.numel() == 0) {
    return {du, filled_vector(u, shape, 0), filled_vector(u, shape, 0), filled_vector(u, shape, 0),
            z};
  }
  const Device device = arguments.guard.device();
  const cudaStream_t stream = arguments.guard.stream();
  check_group_size(op, extent, num_groups, group_norm_backward_shared(extent, params.num_groups),
                   device);
  const Tensor sums = empty_vector(u, {3, extent.n, extent.c});
  const int64_t table = extent.n * extent.c;
  params.sums = {floats(sums), floats(sums) + table, floats(sums) + 2 * table};
  check_launch(op, launch_group_norm_backward(params, device, stream));
  const auto total = [&](const float* sample_sums) {
    const Tensor out = empty_vector(u, shape);
    check_launch(op, launch_totals({sample_sums, extent.n, extent.c, floats(out)}, stream));
    return out;
  };
  return {du, total(params.sums.dgamma), total(params.sums.dbeta), total(params.sums.own), z};
}

}  // namespace ssp
