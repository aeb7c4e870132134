// reference.channel_sum, stage_dots and update_running_stats_.

#include "../ops.h"
#include "channel_sum.h"
#include "running_stats.h"
#include "stage_dots.h"
#include "tensors.h"
#include "totals.h"

namespace ssp {
namespace {

// A running statistic, updated in a copy where it has strides of its own.
struct RunningBuffer {
  RunningBuffer(Operands& operands, const char* name, const OptionalTensor& tensor,
                int64_t channels)
      : buffer(tensor) {
    if (!tensor.has_value()) return;
    updated = torch::stable::contiguous(*tensor);
    operand = operands.vector(name, updated, {channels});
  }
  void write_back() const {
    if (!buffer.has_value() || updated.data_ptr() == buffer->data_ptr()) return;
    Tensor target = *buffer;
    torch::stable::copy_(target, updated);
  }

  OptionalTensor buffer;
  Tensor updated;
  Operand operand;
};

}  // namespace

Tensor channel_sum(const Tensor& g) {
  const char* op = "channel_sum";
  const DeviceGuard guard(op, "g", g);
  check_activation(op, "g", g);
  const bool rows = is_rows(g);
  const Extent extent = merged_extent(checked_extent(op, g, rows));
  Operands operands(op);
  ChannelSumParams params{};
  params.g = operands.activation("g", g, rows);
  if (g.numel() == 0) return filled_vector(g, {extent.c}, 0);
  params.geometry = channel_sum_geometry(extent, guard.device());
  const Tensor partials = empty_vector(g, {params.geometry.parts, extent.c});
  const Tensor sum = empty_vector(g, {extent.c});
  params.partials = floats(partials);
  check_launch(op, launch_channel_sum(params, guard.stream()));
  check_launch(op, launch_totals({floats(partials), params.geometry.parts, extent.c, floats(sum)},
                                 guard.stream()));
  return sum;
}

Tensor stage_dots(const Tensor& g, const std::vector<Tensor>& terms) {
  const char* op = "stage_dots";
  const DeviceGuard guard(op, "g", g);
  check_activation(op, "g", g);
  check_operands(op, "terms", terms.size(), 1, kMaxTerms);
  std::vector<Tensor> all = terms;
  all.push_back(g);
  const bool rows = common_rows(all);
  Operands operands(op);
  StageDotsParams params{};
  params.g = operands.activation("g", g, rows);
  params.count = static_cast<int>(terms.size());
  for (int k = 0; k < params.count; ++k) {
    check_like(op, "terms", terms[k], g);
    check_mixture(op, "terms", terms[k].scalar_type(), "g", g.scalar_type());
    params.terms[k] = operands.activation("terms", terms[k], rows);
  }
  if (g.numel() == 0) return filled_vector(g, {params.count}, 0);
  params.n = g.numel();
  params.blocks = stage_dots_blocks(params.n, guard.device());
  const Tensor partials = empty_vector(g, {params.blocks, params.count});
  const Tensor dots = empty_vector(g, {params.count});
  params.partials = floats(partials);
  check_launch(op, launch_stage_dots(params, guard.stream()));
  check_launch(op, launch_totals({floats(partials), params.blocks, params.count, floats(dots)},
                                 guard.stream()));
  return dots;
}

void update_running_stats_(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, const Tensor& means,
                           const Tensor& variances, double count,
                           const OptionalTensor& count_tensor,
                           const std::optional<double>& momentum) {
  const char* op = "update_running_stats_";
  const DeviceGuard guard(op, "means", means);
  check_activation(op, "means", means);
  SSP_CHECK(means.dim() == 2, op, ": means must have the shape [K, C], but has ", shape_of(means));
  const int64_t uses = means.size(0);
  const int64_t channels = means.size(1);
  Operands operands(op);
  RunningStatsParams params{};
  params.means = operands.activation("means", means, false);
  params.variances = operands.vector("variances", variances, {uses, channels});
  params.uses = uses;
  params.channels = channels;
  params.count = count;
  params.count_tensor = operands.number("count_tensor", count_tensor);
  params.momentum = momentum.value_or(0);
  if (num_batches_tracked.has_value()) {
    check_tracked(op, *num_batches_tracked);
    params.tracked = static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
    params.cumulative = !momentum.has_value();
  }
  const RunningBuffer mean(operands, "running_mean", running_mean, channels);
  const RunningBuffer variance(operands, "running_var", running_var, channels);
  params.running_mean = mean.operand;
  params.running_var = variance.operand;
  if (uses == 0) return;
  check_launch(op, launch_running_stats(params, guard.stream()));
  mean.write_back();
  variance.write_back();
}

}  // namespace ssp
