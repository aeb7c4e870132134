#pragma once

// The ops of _ops.SCHEMAS, which each library implements for its device, and those of
// _ops.OUT_SCHEMAS, which the CPU's does. What each computes: reference.py.

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

namespace ssp {

using Coefficients = std::vector<double>;
template <int kCount>
using Tensors = decltype(std::tuple_cat(std::declval<std::array<Tensor, kCount>>()));

Tensor stage_combine(const std::vector<Tensor>& terms, const Coefficients& coefficients,
                     const OptionalTensor& coefficient_tensor, const OptionalTensor& channel_bias);

Tensors<3> stage_moments(const std::vector<Tensor>& terms, const Coefficients& coefficients,
                         const OptionalTensor& coefficient_tensor,
                         const OptionalTensor& channel_bias, bool write_u);

Tensors<3> stage_norm_act(const std::vector<Tensor>& terms, const Coefficients& coefficients,
                          const OptionalTensor& coefficient_tensor,
                          const OptionalTensor& channel_bias, const Tensor& mean,
                          const Tensor& rstd, const OptionalTensor& gamma,
                          const OptionalTensor& beta, int64_t activation,
                          const OptionalDtype& z_dtype, bool write_u, bool write_mask);
void stage_norm_act_out(const std::vector<Tensor>& terms, const Coefficients& coefficients,
                        const OptionalTensor& coefficient_tensor,
                        const OptionalTensor& channel_bias, const Tensor& mean, const Tensor& rstd,
                        const OptionalTensor& gamma, const OptionalTensor& beta, int64_t activation,
                        const OptionalTensor& u, const Tensor& z, const OptionalTensor& mask);

Tensors<5> stage_batch_norm_act(const std::vector<Tensor>& terms, const Coefficients& coefficients,
                                const OptionalTensor& coefficient_tensor,
                                const OptionalTensor& channel_bias, const OptionalTensor& gamma,
                                const OptionalTensor& beta, double eps, int64_t activation,
                                const OptionalDtype& z_dtype, bool write_u);

Tensors<4> stage_group_norm_act(const std::vector<Tensor>& terms, const Coefficients& coefficients,
                                const OptionalTensor& coefficient_tensor,
                                const OptionalTensor& channel_bias, int64_t num_groups,
                                const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                                int64_t activation, const OptionalDtype& z_dtype, bool write_u);

void update_running_stats_(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, const Tensor& means,
                           const Tensor& variances, double count,
                           const OptionalTensor& count_tensor,
                           const std::optional<double>& momentum);

Tensors<3> norm_act_backward_reduce(const Tensor& dz, double scale,
                                    const OptionalTensor& scale_tensor, const Tensor& u,
                                    const Tensor& mean, const Tensor& rstd,
                                    const OptionalTensor& gamma, const OptionalTensor& beta,
                                    int64_t activation, bool write_z);

Tensor norm_act_backward(const Tensor& dz, double scale, const OptionalTensor& scale_tensor,
                         const OptionalTensor& u, const OptionalTensor& mask,
                         const OptionalTensor& mean, const Tensor& rstd,
                         const OptionalTensor& gamma, const OptionalTensor& beta,
                         int64_t activation, const OptionalTensor& sum_dy,
                         const OptionalTensor& sum_dy_xhat, double count,
                         const OptionalTensor& count_tensor, const std::vector<Tensor>& extras,
                         const Coefficients& extra_coefficients,
                         const OptionalTensor& extra_coefficient_tensor,
                         const OptionalDtype& du_dtype);
void norm_act_backward_out(const Tensor& dz, double scale, const OptionalTensor& scale_tensor,
                           const OptionalTensor& u, const OptionalTensor& mask,
                           const OptionalTensor& mean, const Tensor& rstd,
                           const OptionalTensor& gamma, const OptionalTensor& beta,
                           int64_t activation, const OptionalTensor& sum_dy,
                           const OptionalTensor& sum_dy_xhat, double count,
                           const OptionalTensor& count_tensor, const std::vector<Tensor>& extras,
                           const Coefficients& extra_coefficients,
                           const OptionalTensor& extra_coefficient_tensor, const Tensor& du);

Tensors<4> batch_norm_act_backward(const Tensor& dz, double scale,
                                   const OptionalTensor& scale_tensor, const Tensor& u,
                                   const Tensor& mean, const Tensor& rstd,
                                   const OptionalTensor& gamma, const OptionalTensor& beta,
                                   int64_t activation, const std::vector<Tensor>& extras,
                                   const Coefficients& extra_coefficients,
                                   const OptionalTensor& extra_coefficient_tensor, bool write_z);
Tensors<2> batch_norm_act_backward_out(
    const Tensor& dz, double scale, const OptionalTensor& scale_tensor, const Tensor& u,
    const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
    int64_t activation, const std::vector<Tensor>& extras, const Coefficients& extra_coefficients,
    const OptionalTensor& extra_coefficient_tensor, const Tensor& du, const OptionalTensor& z);

Tensors<5> group_norm_act_backward(const Tensor& dz, double scale,
                                   const OptionalTensor& scale_tensor, const Tensor& u,
                                   const OptionalTensor& channel_bias, const Tensor& mean,
                                   const Tensor& rstd, const OptionalTensor& gamma,
                                   const OptionalTensor& beta, int64_t activation,
                                   const std::vector<Tensor>& extras,
                                   const Coefficients& extra_coefficients,
                                   const OptionalTensor& extra_coefficient_tensor, bool write_z);

Tensor channel_sum(const Tensor& g);
Tensor stage_dots(const Tensor& g, const std::vector<Tensor>& terms);

Tensor linf_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size,
                 double eps, double low, double high);
Tensor l2_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size,
               double eps, double low, double high);

}  // namespace ssp
