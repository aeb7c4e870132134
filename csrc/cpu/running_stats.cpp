// reference.update_running_stats_

#include "ops.h"
#include "tensors.h"

namespace ssp {
namespace {

// running = (1 - factor) running + factor batch
template <class A>
void blend(const OptionalTensor& running, const std::vector<A>& batch, A factor) {
  if (!running.has_value()) return;
  Tensor values = empty_shape({static_cast<int64_t>(batch.size())}, scalar_type_of<A>);
  torch::stable::copy_(values, *running);
  A* value = static_cast<A*>(values.mutable_data_ptr());
  for (size_t c = 0; c < batch.size(); ++c) {
    value[c] = (A(1) - factor) * value[c] + factor * batch[c];
  }
  Tensor target = *running;
  torch::stable::copy_(target, values);
}

}  // namespace

void update_running_stats_(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, const Tensor& means,
                           const Tensor& variances, double count,
                           const OptionalTensor& count_tensor,
                           const std::optional<double>& momentum) {
  const char* op = "update_running_stats_";
  check_activation(op, "means", means);
  SSP_CHECK(means.dim() == 2, op, ": means must have the shape [K, C], but has ", shape_of(means));
  const int64_t uses = means.size(0);
  const int64_t channels = means.size(1);
  check_shape(op, "variances", variances, {uses, channels});
  if (running_mean.has_value()) check_shape(op, "running_mean", *running_mean, {channels});
  if (running_var.has_value()) check_shape(op, "running_var", *running_var, {channels});
  int64_t* tracked = nullptr;
  if (num_batches_tracked.has_value()) {
    check_tracked(op, *num_batches_tracked);
    tracked = static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
  }
  with_arithmetic(means.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const A elements = static_cast<A>(number_or(op, "count_tensor", count, count_tensor));
    const A correction = elements / (elements - A(1));
    const std::vector<double> mean_values = values_of(op, "means", means);
    const std::vector<double> variance_values = values_of(op, "variances", variances);
    for (int64_t use = 0; use < uses; ++use) {
      A factor = static_cast<A>(momentum.value_or(0.0));
      if (tracked != nullptr) {
        ++*tracked;
        if (!momentum.has_value()) factor = A(1) / static_cast<A>(*tracked);
      }
      if (!(elements > A(0))) continue;
      std::vector<A> mean;
      std::vector<A> unbiased;
      for (int64_t c = 0; c < channels; ++c) {
        mean.push_back(static_cast<A>(mean_values[use * channels + c]));
        unbiased.push_back(static_cast<A>(variance_values[use * channels + c]) * correction);
      }
      blend(running_mean, mean, factor);
      blend(running_var, unbiased, factor);
    }
  });
}

}  // namespace ssp
