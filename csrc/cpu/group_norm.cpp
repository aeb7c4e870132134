// reference.stage_group_norm_act and group_norm_act_backward: a sample at a time, so that its
// second pass finds it in cache. Samples are shared among threads; where there are fewer of them,
// their chunks are. The bits are the same: chunks and the order of their sums do not change.

#include "backward_chunk.h"
#include "ops.h"

namespace ssp {
namespace {

// Runs f(first, last) over the chunks of one sample.
struct ChunkLoop {
  bool parallel;
  int64_t elements;
  template <class F>
  void operator()(int64_t chunks, const F& f) const {
    if (parallel) {
      parallel_ranges(chunks, elements, f);
    } else {
      f(0, chunks);
    }
  }
};

// Calls body(n, parameters, loop) for every sample; `parameters` is the caller's to overwrite.
template <class A, class Body>
void for_each_sample(const Extent& e, const ChannelParameters<A>& parameters, const Body& body) {
  if (e.numel() == 0) return;
  const int64_t elements = e.c * e.s;
  if (e.n >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_ranges(e.n, e.numel(), [&](int64_t first, int64_t last) {
      ChannelParameters<A> own = parameters;
      for (int64_t n = first; n < last; ++n) body(n, own, ChunkLoop{false, elements});
    });
    return;
  }
  ChannelParameters<A> own = parameters;
  for (int64_t n = 0; n < e.n; ++n) body(n, own, ChunkLoop{true, elements});
}

// One sample's [num_groups] table as a vector over channels, as the runs take it.
template <class A>
std::vector<A> by_channel(const Partition& sample, const A* table, int64_t per_group) {
  std::vector<A> values(sample.extent().c);
  for (size_t c = 0; c < values.size(); ++c) values[c] = table[c / per_group];
  return sample.expand(values);
}

template <class A>
ChannelParameters<A> affine_parameters(const char* op, const Partition& sample,
                                       const OptionalTensor& gamma, const OptionalTensor& beta) {
  const int64_t c = sample.extent().c;
  return ChannelParameters<A>(sample, {}, {}, channel_vector<A>(op, "gamma", gamma, c, 1),
                              channel_vector<A>(op, "beta", beta, c, 0));
}

}  // namespace

Tensors<4> stage_group_norm_act(const std::vector<Tensor>& terms, const Coefficients& coefficients,
                                const OptionalTensor& coefficient_tensor,
                                const OptionalTensor& channel_bias, int64_t num_groups,
                                const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                                int64_t activation, const OptionalDtype& z_dtype, bool write_u) {
  const char* op = "stage_group_norm_act";
  const StageArguments arguments(op, terms, coefficients, coefficient_tensor, channel_bias);
  check_activation_code(op, activation);
  check_eps(op, eps);
  const Extent e = arguments.extent;
  check_groups(op, num_groups, e.c);
  const Tensor u = write_u ? arguments.empty_like(arguments.dtype) : unwanted(arguments.dtype);
  const Tensor z = arguments.empty_like(result_dtype(op, "z_dtype", z_dtype, arguments.dtype));
  return with_arithmetic(arguments.dtype, [&](auto zero) {
    using A = decltype(zero);
    const int64_t per_group = e.c / num_groups;
    const Partition sample({1, e.c, e.s, e.rows});
    // In planes a group is one run of memory.
    const Partition groups = e.rows ? sample : Partition({1, num_groups, per_group * e.s, false});
    const int64_t units = groups.extent().c;

    Stage<A> stage(arguments);
    if (write_u) stage.write_to(u);
    const Stage<A> stored =
        write_u ? Stage<A>(StageArguments(op, {u}, {1.0}, std::nullopt, std::nullopt)) : stage;
    std::vector<A> mean(e.n * num_groups, A(0));
    std::vector<A> rstd(e.n * num_groups, reciprocal_deviation(A(0), eps));
    const NormalizeOutput<A> output(sample, z, std::nullopt);

    for_each_sample(e, affine_parameters<A>(op, sample, gamma, beta),
                    [&](int64_t n, ChannelParameters<A>& parameters, const ChunkLoop& loop) {
                      const int64_t begin = n * e.c * e.s;
                      std::vector<Moments> partial(groups.slots() * units);
                      loop(groups.chunks(), [&](int64_t first, int64_t last) {
                        for (int64_t i = first; i < last; ++i) {
                          const Chunk chunk = groups.chunk(i).shifted(begin);
                          chunk_moments(stage, groups.per_element(), chunk,
                                        partial.data() + chunk.slot * units + chunk.channel);
                        }
                      });
                      const int64_t members = units / num_groups;
                      for (int64_t g = 0; g < num_groups; ++g) {
                        Moments total;
                        for (int64_t unit = g * members; unit < (g + 1) * members; ++unit) {
                          for (int64_t slot = 0; slot < groups.slots(); ++slot) {
                            total = merge(total, partial[slot * units + unit]);
                          }
                        }
                        mean[n * num_groups + g] = static_cast<A>(total.mean);
                        rstd[n * num_groups + g] =
                            reciprocal_deviation(static_cast<A>(total.m2 / total.count), eps);
                      }
                      parameters.mean = by_channel(sample, mean.data() + n * num_groups, per_group);
                      parameters.rstd = by_channel(sample, rstd.data() + n * num_groups, per_group);
                      loop(sample.chunks(), [&](int64_t first, int64_t last) {
                        StageScratch<A> scratch;
                        for (int64_t i = first; i < last; ++i) {
                          normalize_chunk(stored, sample.chunk(i).shifted(begin), parameters,
                                          static_cast<int>(activation), output, scratch);
                        }
                      });
                    });
    const std::vector<int64_t> shape = {e.n, num_groups};
    return Tensors<4>(u, z, tensor_of<A>(mean, shape), tensor_of<A>(rstd, shape));
  });
}

Tensors<5> group_norm_act_backward(const Tensor& dz, double scale,
                                   const OptionalTensor& scale_tensor, const Tensor& u,
                                   const OptionalTensor& channel_bias, const Tensor& mean,
                                   const Tensor& rstd, const OptionalTensor& gamma,
                                   const OptionalTensor& beta, int64_t activation,
                                   const std::vector<Tensor>& extras,
                                   const Coefficients& extra_coefficients,
                                   const OptionalTensor& extra_coefficient_tensor, bool write_z) {
  const char* op = "group_norm_act_backward";
  const StageArguments arguments(op, {u}, {1.0}, std::nullopt, channel_bias);
  check_dz(op, dz, u);
  check_activation_code(op, activation);
  const Extent e = arguments.extent;
  SSP_CHECK(mean.dim() == 2, op, ": mean must have the shape [N, num_groups], but has ",
            shape_of(mean));
  const int64_t num_groups = mean.size(1);
  check_groups(op, num_groups, e.c);
  check_shape(op, "mean", mean, {e.n, num_groups});
  check_shape(op, "rstd", rstd, {e.n, num_groups});
  const Tensor dense_dz = dense(dz, e.rows);
  const ScalarType z_dtype = dz.scalar_type();
  const Tensor z = write_z ? arguments.empty_like(z_dtype) : unwanted(z_dtype);
  const Tensor du = arguments.empty_like(u.scalar_type());
  return with_arithmetic(u.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const int64_t per_group = e.c / num_groups;
    const double count = static_cast<double>(per_group * e.s);
    const Partition sample({1, e.c, e.s, e.rows});
    const Stage<A> stage(arguments);
    const BackwardInput<A> input{dense_dz,
                                 static_cast<A>(number_or(op, "scale_tensor", scale, scale_tensor)),
                                 static_cast<int>(activation)};
    const Extras<A> all_extras(op, extras, extra_coefficients, extra_coefficient_tensor, u, e.rows,
                               u.scalar_type());
    const std::optional<Operand<A>> z_output =
        write_z ? std::optional<Operand<A>>(z) : std::nullopt;
    const Operand<A> output(du);
    const std::vector<double> mean_values = values_of(op, "mean", mean);
    const std::vector<double> rstd_values = values_of(op, "rstd", rstd);
    const std::vector<A> means(mean_values.begin(), mean_values.end());
    const std::vector<A> rstds(rstd_values.begin(), rstd_values.end());
    const std::vector<A> gammas = channel_vector<A>(op, "gamma", gamma, e.c, 1);
    std::vector<BackwardSums> sums(e.n * e.c);
    std::vector<double> own_sums(e.n * e.c);

    for_each_sample(
        e, affine_parameters<A>(op, sample, gamma, beta),
        [&](int64_t n, ChannelParameters<A>& parameters, const ChunkLoop& loop) {
          const int64_t begin = n * e.c * e.s;
          const A* sample_rstd = rstds.data() + n * num_groups;
          parameters.mean = by_channel(sample, means.data() + n * num_groups, per_group);
          parameters.rstd = by_channel(sample, sample_rstd, per_group);
          std::vector<BackwardSums> partial(sample.slots() * e.c);
          loop(sample.chunks(), [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
              const Chunk chunk = sample.chunk(i).shifted(begin);
              reduce_chunk(input, stage, chunk, parameters, true, z_output,
                           partial.data() + chunk.slot * e.c + chunk.channel);
            }
          });
          BackwardSums* sample_sums = sums.data() + n * e.c;
          for (int64_t slot = 0; slot < sample.slots(); ++slot) {
            for (int64_t c = 0; c < e.c; ++c) sample_sums[c] += partial[slot * e.c + c];
          }
          std::vector<A> mean_dy(num_groups);
          std::vector<A> mean_dy_xhat(num_groups);
          for (int64_t g = 0; g < num_groups; ++g) {
            const int64_t end = (g + 1) * per_group;
            double dy = 0;
            double dy_xhat = 0;
            for (int64_t c = g * per_group; c < end; ++c) {
              dy += gammas[c] * sample_sums[c].dy;
              dy_xhat += gammas[c] * sample_sums[c].dy_xhat;
            }
            mean_dy[g] = static_cast<A>(dy /= count);
            mean_dy_xhat[g] = static_cast<A>(dy_xhat /= count);
            if (per_group == 1) continue;  // the group's own sum, exactly 0
            // input_gradient, summed: what is subtracted is the same for all elements but for xhat.
            const double size = static_cast<double>(e.s);
            for (int64_t c = g * per_group; c < end; ++c) {
              const double xhat =
                  (sample_sums[c].u - size * means[n * num_groups + g]) * sample_rstd[g];
              own_sums[n * e.c + c] =
                  sample_rstd[g] * (gammas[c] * sample_sums[c].dy - size * dy - xhat * dy_xhat);
            }
          }
          parameters.mean_dy = by_channel(sample, mean_dy.data(), per_group);
          parameters.mean_dy_xhat = by_channel(sample, mean_dy_xhat.data(), per_group);
          loop(sample.chunks(), [&](int64_t first, int64_t last) {
            StageScratch<A> scratch;
            for (int64_t i = first; i < last; ++i) {
              backward_chunk(input, stage, sample.chunk(i).shifted(begin), parameters, all_extras,
                             output, scratch);
            }
          });
        });

    std::vector<double> dgamma(e.c);
    std::vector<double> dbeta(e.c);
    std::vector<double> own(e.c);
    for (int64_t i = 0; i < e.n * e.c; ++i) {
      dgamma[i % e.c] += sums[i].dy_xhat;
      dbeta[i % e.c] += sums[i].dy;
      own[i % e.c] += own_sums[i];
    }
    const std::vector<int64_t> shape = {e.c};
    return Tensors<5>(du, tensor_of<A>(dgamma, shape), tensor_of<A>(dbeta, shape),
                      tensor_of<A>(own, shape), z);
  });
}

}  // namespace ssp
