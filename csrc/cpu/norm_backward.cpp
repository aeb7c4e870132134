// reference.norm_act_backward_reduce, norm_act_backward, batch_norm_act_backward.
// A run of du is written after all that it is computed from is read: it may lie where an operand
// does.

#include "backward_chunk.h"
#include "math/activation.h"
#include "ops.h"

namespace ssp {
namespace {

template <class A>
ChannelParameters<A> parameters_of(const char* op, const Partition& partition,
                                   const OptionalTensor& mean, const OptionalTensor& rstd,
                                   const OptionalTensor& gamma, const OptionalTensor& beta) {
  const int64_t c = partition.extent().c;
  return ChannelParameters<A>(partition, channel_vector<A>(op, "mean", mean, c, 0),
                              channel_vector<A>(op, "rstd", rstd, c, 1),
                              channel_vector<A>(op, "gamma", gamma, c, 1),
                              channel_vector<A>(op, "beta", beta, c, 0));
}

// Sums over all but the channels.
template <class A>
std::vector<BackwardSums> channel_sums(const BackwardInput<A>& input, const Stage<A>& stage,
                                       const Partition& partition,
                                       const ChannelParameters<A>& parameters,
                                       const std::optional<Operand<A>>& z) {
  const int64_t channels = partition.extent().c;
  std::vector<BackwardSums> partial(partition.slots() * channels);
  parallel_ranges(partition.chunks(), partition.extent().numel(), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Chunk chunk = partition.chunk(i);
      BackwardSums* sums = partial.data() + chunk.slot * channels + chunk.channel;
      reduce_chunk(input, stage, chunk, parameters, false, z, sums);
    }
  });
  std::vector<BackwardSums> total(channels);
  for (int64_t slot = 0; slot < partition.slots(); ++slot) {
    for (int64_t c = 0; c < channels; ++c) total[c] += partial[slot * channels + c];
  }
  return total;
}

// What input_gradient subtracts, from the sums over `count` elements.
template <class A>
void set_means(const Partition& partition, const std::vector<double>& sum_dy,
               const std::vector<double>& sum_dy_xhat, const std::vector<A>& gamma, double count,
               ChannelParameters<A>& parameters) {
  std::vector<A> mean_dy;
  std::vector<A> mean_dy_xhat;
  for (size_t c = 0; c < gamma.size(); ++c) {
    mean_dy.push_back(static_cast<A>(gamma[c] * (sum_dy[c] / count)));
    mean_dy_xhat.push_back(static_cast<A>(gamma[c] * (sum_dy_xhat[c] / count)));
  }
  parameters.mean_dy = partition.expand(mean_dy);
  parameters.mean_dy_xhat = partition.expand(mean_dy_xhat);
}

// From the end: what was read last, by the sums, is still in the cache.
template <class A>
void backward_chunks(const BackwardInput<A>& input, const Stage<A>& stage,
                     const Partition& partition, const ChannelParameters<A>& parameters,
                     const Extras<A>& extras, const Tensor& du) {
  const Operand<A> output(du);
  parallel_ranges(partition.chunks(), partition.extent().numel(), [&](int64_t first, int64_t last) {
    StageScratch<A> scratch;
    for (int64_t i = last; i-- > first;) {
      backward_chunk(input, stage, partition.chunk(i), parameters, extras, output, scratch);
    }
  });
}

// du = gamma * rstd * dy + extras, dy from the mask (or dz itself, without one).
template <class A>
void masked_chunks(const BackwardInput<A>& input, const uint8_t* bits, const Partition& partition,
                   const ChannelParameters<A>& parameters, const Extras<A>& extras,
                   const Tensor& du) {
  const TileKernels<A>& kernels = tiles<A>();
  const Operand<A> output(du);
  const MaskLayout layout(partition.extent());
  parallel_ranges(partition.chunks(), partition.extent().numel(), [&](int64_t first, int64_t last) {
    StageScratch<A> scratch;
    alignas(64) A dz_buffer[kTile];
    alignas(64) A own_buffer[kTile];
    uint8_t positive[kTile + 8] = {};
    const auto run = [&](int64_t offset, int64_t n, int64_t parameter) {
      if (bits != nullptr) {
        layout.for_each_piece(offset, n, [&](int64_t byte, int64_t done, int64_t length) {
          kernels.unpack_mask(bits + byte, positive + done, length);
        });
      }
      const A* dz = input.dz.load(offset, n, dz_buffer);
      A* own = extras.empty() ? output.target(offset, own_buffer) : own_buffer;
      kernels.backward_masked(input.activation, parameters.at(parameter), input.scale, dz, positive,
                              own, n);
      extras.finish(own, offset, n, output, scratch, dz_buffer);
    };
    for (int64_t i = first; i < last; ++i) {
      for_each_run(partition.chunk(i), partition.per_element(), run);
    }
  });
}

template <class Member>
std::vector<double> values_of_sums(const std::vector<BackwardSums>& sums, Member member) {
  std::vector<double> values;
  for (const BackwardSums& sum : sums) values.push_back(sum.*member);
  return values;
}

StageArguments stored_stage(const char* op, const Tensor& u) {
  return StageArguments(op, {u}, {1.0}, std::nullopt, std::nullopt);
}

// du, into a tensor of the caller's or else a new one.
Tensor input_gradient(const char* op, const Tensor& dz, double scale,
                      const OptionalTensor& scale_tensor, const OptionalTensor& u,
                      const OptionalTensor& mask, const OptionalTensor& mean, const Tensor& rstd,
                      const OptionalTensor& gamma, const OptionalTensor& beta, int64_t activation,
                      const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat, double count,
                      const OptionalTensor& count_tensor, const std::vector<Tensor>& extras,
                      const Coefficients& extra_coefficients,
                      const OptionalTensor& extra_coefficient_tensor, const OptionalDtype& du_dtype,
                      const OptionalTensor& out) {
  check_activation(op, "dz", dz);
  check_activation_code(op, activation);
  check_norm_backward(op, u, mask, mean, activation, sum_dy, sum_dy_xhat);
  if (u.has_value()) check_dz(op, dz, *u);

  const ScalarType dtype =
      result_dtype(op, "du_dtype", du_dtype, u.has_value() ? u->scalar_type() : dz.scalar_type());
  bool rows = is_rows(u.value_or(dz));
  if (mask.has_value()) {
    rows = mask->dim() == 2;
    check_mask(op, *mask, extent_of(dz, rows));
  }
  if (out.has_value()) check_result(op, "du", *out, dz, rows, dtype);
  const Tensor du = out.has_value() ? *out : empty(dz, shape_vector(dz), rows, dtype);
  const Tensor dense_dz = dense(dz, rows);
  with_arithmetic(dtype, [&](auto zero) {
    using A = decltype(zero);
    const Partition partition(extent_of(dz, rows));
    const BackwardInput<A> input{dense_dz,
                                 static_cast<A>(number_or(op, "scale_tensor", scale, scale_tensor)),
                                 static_cast<int>(activation)};
    ChannelParameters<A> parameters = parameters_of<A>(op, partition, mean, rstd, gamma, beta);
    const Extras<A> all_extras(op, extras, extra_coefficients, extra_coefficient_tensor, dz, rows,
                               dtype);
    if (!u.has_value()) {
      const Tensor bits = mask.has_value() ? torch::stable::contiguous(*mask) : Tensor();
      const uint8_t* data =
          mask.has_value() ? static_cast<const uint8_t*>(bits.const_data_ptr()) : nullptr;
      masked_chunks(input, data, partition, parameters, all_extras, du);
      return;
    }
    if (sum_dy.has_value()) {
      const int64_t c = partition.extent().c;
      check_shape(op, "sum_dy", *sum_dy, {c});
      check_shape(op, "sum_dy_xhat", *sum_dy_xhat, {c});
      set_means(partition, values_of(op, "sum_dy", *sum_dy),
                values_of(op, "sum_dy_xhat", *sum_dy_xhat),
                channel_vector<A>(op, "gamma", gamma, c, 1),
                number_or(op, "count_tensor", count, count_tensor), parameters);
    }
    backward_chunks(input, Stage<A>(stored_stage(op, *u)), partition, parameters, all_extras, du);
  });
  return du;
}

// du as above, sum dy, sum dy xhat, z. Neither du nor an operand may lie where z does: it is
// written before these are read a second time.
Tensors<4> batch_gradient(const char* op, const Tensor& dz, double scale,
                          const OptionalTensor& scale_tensor, const Tensor& u, const Tensor& mean,
                          const Tensor& rstd, const OptionalTensor& gamma,
                          const OptionalTensor& beta, int64_t activation,
                          const std::vector<Tensor>& extras, const Coefficients& extra_coefficients,
                          const OptionalTensor& extra_coefficient_tensor, bool write_z,
                          const OptionalTensor& du_out, const OptionalTensor& z_out) {
  check_dz(op, dz, u);
  check_activation_code(op, activation);
  const StageArguments arguments = stored_stage(op, u);
  const bool rows = arguments.extent.rows;
  const Tensor dense_dz = dense(dz, rows);
  const ScalarType z_dtype = dz.scalar_type();
  if (du_out.has_value()) check_result(op, "du", *du_out, u, rows, u.scalar_type());
  if (z_out.has_value()) check_result(op, "z", *z_out, u, rows, z_dtype);
  if (du_out.has_value() && z_out.has_value()) {
    SSP_CHECK(du_out->data_ptr() != z_out->data_ptr() || z_out->numel() == 0, op,
              ": du and z must be two tensors, but are one");
  }
  const Tensor du = du_out.has_value() ? *du_out : arguments.empty_like(u.scalar_type());
  const Tensor z = z_out.has_value() ? *z_out
                   : write_z         ? arguments.empty_like(z_dtype)
                                     : unwanted(z_dtype);
  return with_arithmetic(u.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Partition partition(arguments.extent);
    const int64_t c = arguments.extent.c;
    const BackwardInput<A> input{dense_dz,
                                 static_cast<A>(number_or(op, "scale_tensor", scale, scale_tensor)),
                                 static_cast<int>(activation)};
    ChannelParameters<A> parameters = parameters_of<A>(op, partition, mean, rstd, gamma, beta);
    const Extras<A> all_extras(op, extras, extra_coefficients, extra_coefficient_tensor, u, rows,
                               u.scalar_type());
    const Stage<A> stage(arguments);
    const std::vector<BackwardSums> sums = channel_sums(
        input, stage, partition, parameters, write_z ? std::optional<Operand<A>>(z) : std::nullopt);
    const std::vector<double> sum_dy = values_of_sums(sums, &BackwardSums::dy);
    const std::vector<double> sum_dy_xhat = values_of_sums(sums, &BackwardSums::dy_xhat);
    set_means(partition, sum_dy, sum_dy_xhat, channel_vector<A>(op, "gamma", gamma, c, 1),
              static_cast<double>(std::max<int64_t>(arguments.extent.per_channel(), 1)),
              parameters);
    backward_chunks(input, stage, partition, parameters, all_extras, du);
    return Tensors<4>(du, tensor_of<A>(sum_dy, {c}), tensor_of<A>(sum_dy_xhat, {c}), z);
  });
}

}  // namespace

Tensors<3> norm_act_backward_reduce(const Tensor& dz, double scale,
                                    const OptionalTensor& scale_tensor, const Tensor& u,
                                    const Tensor& mean, const Tensor& rstd,
                                    const OptionalTensor& gamma, const OptionalTensor& beta,
                                    int64_t activation, bool write_z) {
  const char* op = "norm_act_backward_reduce";
  check_dz(op, dz, u);
  check_activation_code(op, activation);
  const StageArguments arguments = stored_stage(op, u);
  const Tensor dense_dz = dense(dz, arguments.extent.rows);
  const ScalarType z_dtype = dz.scalar_type();
  const Tensor z = write_z ? arguments.empty_like(z_dtype) : unwanted(z_dtype);
  return with_arithmetic(u.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Partition partition(arguments.extent);
    const BackwardInput<A> input{dense_dz,
                                 static_cast<A>(number_or(op, "scale_tensor", scale, scale_tensor)),
                                 static_cast<int>(activation)};
    const ChannelParameters<A> parameters =
        parameters_of<A>(op, partition, mean, rstd, gamma, beta);
    const std::vector<BackwardSums> sums =
        channel_sums(input, Stage<A>(arguments), partition, parameters,
                     write_z ? std::optional<Operand<A>>(z) : std::nullopt);
    const std::vector<int64_t> shape = {arguments.extent.c};
    return Tensors<3>(tensor_of<A>(values_of_sums(sums, &BackwardSums::dy), shape),
                      tensor_of<A>(values_of_sums(sums, &BackwardSums::dy_xhat), shape), z);
  });
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
  return input_gradient("norm_act_backward", dz, scale, scale_tensor, u, mask, mean, rstd, gamma,
                        beta, activation, sum_dy, sum_dy_xhat, count, count_tensor, extras,
                        extra_coefficients, extra_coefficient_tensor, du_dtype, std::nullopt);
}

void norm_act_backward_out(const Tensor& dz, double scale, const OptionalTensor& scale_tensor,
                           const OptionalTensor& u, const OptionalTensor& mask,
                           const OptionalTensor& mean, const Tensor& rstd,
                           const OptionalTensor& gamma, const OptionalTensor& beta,
                           int64_t activation, const OptionalTensor& sum_dy,
                           const OptionalTensor& sum_dy_xhat, double count,
                           const OptionalTensor& count_tensor, const std::vector<Tensor>& extras,
                           const Coefficients& extra_coefficients,
                           const OptionalTensor& extra_coefficient_tensor, const Tensor& du) {
  input_gradient("norm_act_backward.out", dz, scale, scale_tensor, u, mask, mean, rstd, gamma, beta,
                 activation, sum_dy, sum_dy_xhat, count, count_tensor, extras, extra_coefficients,
                 extra_coefficient_tensor, du.scalar_type(), du);
}

Tensors<4> batch_norm_act_backward(const Tensor& dz, double scale,
                                   const OptionalTensor& scale_tensor, const Tensor& u,
                                   const Tensor& mean, const Tensor& rstd,
                                   const OptionalTensor& gamma, const OptionalTensor& beta,
                                   int64_t activation, const std::vector<Tensor>& extras,
                                   const Coefficients& extra_coefficients,
                                   const OptionalTensor& extra_coefficient_tensor, bool write_z) {
  return batch_gradient("batch_norm_act_backward", dz, scale, scale_tensor, u, mean, rstd, gamma,
                        beta, activation, extras, extra_coefficients, extra_coefficient_tensor,
                        write_z, std::nullopt, std::nullopt);
}

Tensors<2> batch_norm_act_backward_out(
    const Tensor& dz, double scale, const OptionalTensor& scale_tensor, const Tensor& u,
    const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma, const OptionalTensor& beta,
    int64_t activation, const std::vector<Tensor>& extras, const Coefficients& extra_coefficients,
    const OptionalTensor& extra_coefficient_tensor, const Tensor& du, const OptionalTensor& z) {
  auto [du_written, sum_dy, sum_dy_xhat, z_written] = batch_gradient(
      "batch_norm_act_backward.out", dz, scale, scale_tensor, u, mean, rstd, gamma, beta,
      activation, extras, extra_coefficients, extra_coefficient_tensor, z.has_value(), du, z);
  return {sum_dy, sum_dy_xhat};
}

}  // namespace ssp
