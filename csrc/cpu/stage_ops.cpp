// reference.stage_combine, stage_moments, stage_norm_act, stage_batch_norm_act.
// A run's operands are read before its results are written: these may lie where those do.

#include <cmath>
#include <tuple>

#include "normalize_chunk.h"
#include "ops.h"
#include "stage.h"

namespace ssp {

StageArguments::StageArguments(const char* op_name, const std::vector<Tensor>& operands,
                               const std::vector<double>& numbers,
                               const OptionalTensor& coefficient_tensor, const OptionalTensor& bias)
    : op(op_name), channel_bias(bias) {
  check_operands(op, "terms", operands.size(), 1, kMaxTerms);
  for (const Tensor& term : operands) check_like(op, "terms", term, operands[0]);
  dtype = stage_dtype(op, operands);
  const bool rows = common_rows(operands);
  for (const Tensor& term : operands) terms.push_back(dense(term, rows));
  extent = extent_of(terms[0], rows);
  coefficients = numbers_or(op, "coefficients", numbers, coefficient_tensor, operands.size());
  if (bias.has_value()) check_shape(op, "channel_bias", *bias, {extent.c});
}

namespace {

template <class A>
void combine_chunks(const Stage<A>& stage, const Partition& partition) {
  parallel_ranges(partition.chunks(), partition.extent().numel(), [&](int64_t first, int64_t last) {
    StageScratch<A> scratch;
    for (int64_t i = first; i < last; ++i) {
      for_each_run(partition.chunk(i), true,
                   [&](int64_t offset, int64_t n, int64_t) { stage.run(offset, n, scratch); });
    }
  });
}

// Moments of each channel; the stage is written if it has where to.
template <class A>
std::vector<Moments> channel_moments(const Stage<A>& stage, const Partition& partition) {
  const int64_t channels = partition.extent().c;
  std::vector<Moments> partial(partition.slots() * channels);
  parallel_ranges(partition.chunks(), partition.extent().numel(), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Chunk chunk = partition.chunk(i);
      Moments* moments = partial.data() + chunk.slot * channels + chunk.channel;
      chunk_moments(stage, partition.per_element(), chunk, moments);
    }
  });
  std::vector<Moments> total(channels);
  for (int64_t slot = 0; slot < partition.slots(); ++slot) {
    for (int64_t c = 0; c < channels; ++c) {
      total[c] = merge(total[c], partial[slot * channels + c]);
    }
  }
  return total;
}

template <class A>
std::tuple<std::vector<A>, std::vector<A>> mean_and_variance(const std::vector<Moments>& moments) {
  std::vector<A> mean;
  std::vector<A> variance;
  for (const Moments& m : moments) {
    mean.push_back(static_cast<A>(m.mean));
    variance.push_back(m.count > 0 ? static_cast<A>(m.m2 / m.count) : A(0));
  }
  return {mean, variance};
}

// From the end: what was read or written last, by the pass before, is still in the cache.
template <class A>
void normalize_chunks(const Stage<A>& stage, const Partition& partition,
                      const ChannelParameters<A>& parameters, int activation, const Tensor& z,
                      const OptionalTensor& mask) {
  const NormalizeOutput<A> output(partition, z, mask);
  parallel_ranges(partition.chunks(), partition.extent().numel(), [&](int64_t first, int64_t last) {
    StageScratch<A> scratch;
    for (int64_t i = last; i-- > first;) {
      normalize_chunk(stage, partition.chunk(i), parameters, activation, output, scratch);
    }
  });
}

// z; u and the mask where they are given.
void normalize_stage(const StageArguments& arguments, const Tensor& mean, const Tensor& rstd,
                     const OptionalTensor& gamma, const OptionalTensor& beta, int64_t activation,
                     const OptionalTensor& u, const Tensor& z, const OptionalTensor& mask) {
  with_arithmetic(arguments.dtype, [&](auto zero) {
    using A = decltype(zero);
    Stage<A> stage(arguments);
    if (u.has_value()) stage.write_to(*u);
    const Partition partition(arguments.extent);
    const int64_t c = arguments.extent.c;
    const char* op = arguments.op;
    const ChannelParameters<A> parameters(partition, channel_vector<A>(op, "mean", mean, c, 0),
                                          channel_vector<A>(op, "rstd", rstd, c, 1),
                                          channel_vector<A>(op, "gamma", gamma, c, 1),
                                          channel_vector<A>(op, "beta", beta, c, 0));
    normalize_chunks(stage, partition, parameters, static_cast<int>(activation), z, mask);
  });
}

}  // namespace

Tensor stage_combine(const std::vector<Tensor>& terms, const std::vector<double>& coefficients,
                     const OptionalTensor& coefficient_tensor, const OptionalTensor& channel_bias) {
  const StageArguments arguments("stage_combine", terms, coefficients, coefficient_tensor,
                                 channel_bias);
  const Tensor u = arguments.empty_like(arguments.dtype);
  with_arithmetic(arguments.dtype, [&](auto zero) {
    Stage<decltype(zero)> stage(arguments);
    stage.write_to(u);
    combine_chunks(stage, Partition(arguments.extent));
  });
  return u;
}

std::tuple<Tensor, Tensor, Tensor> stage_moments(const std::vector<Tensor>& terms,
                                                 const std::vector<double>& coefficients,
                                                 const OptionalTensor& coefficient_tensor,
                                                 const OptionalTensor& channel_bias, bool write_u) {
  const StageArguments arguments("stage_moments", terms, coefficients, coefficient_tensor,
                                 channel_bias);
  const Tensor u = write_u ? arguments.empty_like(arguments.dtype) : unwanted(arguments.dtype);
  return with_arithmetic(arguments.dtype, [&](auto zero) {
    using A = decltype(zero);
    Stage<A> stage(arguments);
    if (write_u) stage.write_to(u);
    const auto [mean, variance] =
        mean_and_variance<A>(channel_moments(stage, Partition(arguments.extent)));
    const std::vector<int64_t> shape = {arguments.extent.c};
    return std::make_tuple(u, tensor_of<A>(mean, shape), tensor_of<A>(variance, shape));
  });
}

std::tuple<Tensor, Tensor, Tensor> stage_norm_act(
    const std::vector<Tensor>& terms, const std::vector<double>& coefficients,
    const OptionalTensor& coefficient_tensor, const OptionalTensor& channel_bias,
    const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
    int64_t activation, const std::optional<ScalarType>& z_dtype, bool write_u, bool write_mask) {
  const char* op = "stage_norm_act";
  const StageArguments arguments(op, terms, coefficients, coefficient_tensor, channel_bias);
  check_activation_code(op, activation);
  const Tensor u = write_u ? arguments.empty_like(arguments.dtype) : unwanted(arguments.dtype);
  const Tensor z = arguments.empty_like(result_dtype(op, "z_dtype", z_dtype, arguments.dtype));
  const Tensor mask = write_mask ? empty_mask(arguments.extent) : unwanted(ScalarType::Byte);
  normalize_stage(arguments, mean, rstd, gamma, beta, activation,
                  write_u ? OptionalTensor(u) : std::nullopt, z,
                  write_mask ? OptionalTensor(mask) : std::nullopt);
  return {u, z, mask};
}

void stage_norm_act_out(const std::vector<Tensor>& terms, const std::vector<double>& coefficients,
                        const OptionalTensor& coefficient_tensor,
                        const OptionalTensor& channel_bias, const Tensor& mean, const Tensor& rstd,
                        const OptionalTensor& gamma, const OptionalTensor& beta, int64_t activation,
                        const OptionalTensor& u, const Tensor& z, const OptionalTensor& mask) {
  const char* op = "stage_norm_act.out";
  const StageArguments arguments(op, terms, coefficients, coefficient_tensor, channel_bias);
  check_activation_code(op, activation);
  const bool rows = arguments.extent.rows;
  check_result(op, "z", z, terms[0], rows, result_dtype(op, "z", z.scalar_type(), arguments.dtype));
  if (u.has_value()) {
    check_result(op, "u", *u, terms[0], rows, arguments.dtype);
    SSP_CHECK(u->data_ptr() != z.data_ptr() || z.numel() == 0, op,
              ": u and z must be two tensors, but are one");
  }
  if (mask.has_value()) check_mask(op, *mask, arguments.extent);
  normalize_stage(arguments, mean, rstd, gamma, beta, activation, u, z, mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> stage_batch_norm_act(
    const std::vector<Tensor>& terms, const std::vector<double>& coefficients,
    const OptionalTensor& coefficient_tensor, const OptionalTensor& channel_bias,
    const OptionalTensor& gamma, const OptionalTensor& beta, double eps, int64_t activation,
    const std::optional<ScalarType>& z_dtype, bool write_u) {
  const char* op = "stage_batch_norm_act";
  const StageArguments arguments(op, terms, coefficients, coefficient_tensor, channel_bias);
  check_activation_code(op, activation);
  check_eps(op, eps);
  const Tensor z = arguments.empty_like(result_dtype(op, "z_dtype", z_dtype, arguments.dtype));
  return with_arithmetic(arguments.dtype, [&](auto zero) {
    using A = decltype(zero);
    const Partition partition(arguments.extent);
    const int64_t c = arguments.extent.c;
    Stage<A> stage(arguments);
    // Even where u is not wanted: the second pass reads one tensor, not all the terms again.
    const bool read_again = stage.is_copy() && !write_u;
    const Tensor u = read_again ? arguments.terms[0] : arguments.empty_like(arguments.dtype);
    if (!read_again) stage.write_to(u);
    const auto [mean, variance] = mean_and_variance<A>(channel_moments(stage, partition));
    std::vector<A> rstd;
    for (const A value : variance) rstd.push_back(reciprocal_deviation(value, eps));
    const ChannelParameters<A> parameters(partition, mean, rstd,
                                          channel_vector<A>(op, "gamma", gamma, c, 1),
                                          channel_vector<A>(op, "beta", beta, c, 0));
    const Stage<A> stored(StageArguments(op, {u}, {1.0}, std::nullopt, std::nullopt));
    normalize_chunks(stored, partition, parameters, static_cast<int>(activation), z, std::nullopt);
    return std::make_tuple(write_u ? u : unwanted(arguments.dtype), z, tensor_of<A>(mean, {c}),
                           tensor_of<A>(variance, {c}), tensor_of<A>(rstd, {c}));
  });
}

}  // namespace ssp
