#include "backward_chunk.h"

namespace ssp {
namespace {

// Rows over which sums are formed in A.
constexpr int64_t kSumRows = 16;

}  // namespace

template <class A>
void reduce_chunk(const BackwardInput<A>& input, const Stage<A>& stage, const Chunk& chunk,
                  const ChannelParameters<A>& parameters, bool sum_u,
                  const std::optional<Operand<A>>& z, BackwardSums* sums) {
  const TileKernels<A>& kernels = tiles<A>();
  StageScratch<A> scratch;
  alignas(64) A buffer[kTile];
  alignas(64) A dy[kTile];
  alignas(64) A dy_xhat[kTile];
  const auto run = [&](const A* u, int64_t offset, int64_t n, int64_t parameter) {
    const Parameters<A> p = parameters.at(parameter);
    if (z.has_value()) {
      A* target = z->target(offset, buffer);
      kernels.normalize_act(input.activation, p, u, target, n);
      z->store(offset, target, n);
    }
    const A* dz = input.dz.load(offset, n, buffer);
    kernels.backward_terms(input.activation, p, input.scale, dz, u, dy, dy_xhat, n);
  };
  std::fill_n(sums, chunk.channels, BackwardSums{});

  if (!parameters.per_element) {
    for_each_run(chunk, false, [&](int64_t offset, int64_t n, int64_t parameter) {
      const A* u = stage.run(offset, n, scratch);
      run(u, offset, n, parameter);
      sums->dy += kernels.run_sum(dy, n);
      sums->dy_xhat += kernels.run_sum(dy_xhat, n);
      if (sum_u) sums->u += kernels.run_sum(u, n);
    });
    return;
  }

  const int64_t width = chunk.width;
  alignas(64) A u_buffer[kSumRows * kTile];
  double dy_columns[kTile] = {};
  double dy_xhat_columns[kTile] = {};
  double u_columns[kTile] = {};
  for (int64_t begin = 0; begin < chunk.rows; begin += kSumRows) {
    const Chunk part = chunk.part(begin, std::min(kSumRows, chunk.rows - begin), 0, width);
    const Block<A> u = produce(stage, part, scratch, u_buffer);
    std::fill_n(dy, width, A(0));
    std::fill_n(dy_xhat, width, A(0));
    for (int64_t r = 0; r < part.rows; ++r) {
      run(u.data + r * u.stride, part.offset + r * part.stride, width, part.parameter);
    }
    kernels.column_sums(dy, 1, width, width, dy_columns);
    kernels.column_sums(dy_xhat, 1, width, width, dy_xhat_columns);
    if (sum_u) kernels.column_sums(u.data, part.rows, u.stride, width, u_columns);
  }
  for (int64_t j = 0; j < width;) {
    for (int64_t c = 0; c < chunk.channels; ++c) {
      for (int64_t i = 0; i < chunk.inner; ++i, ++j) {
        sums[c] += {dy_columns[j], dy_xhat_columns[j], u_columns[j]};
      }
    }
  }
}

template void reduce_chunk(const BackwardInput<float>&, const Stage<float>&, const Chunk&,
                           const ChannelParameters<float>&, bool,
                           const std::optional<Operand<float>>&, BackwardSums*);
template void reduce_chunk(const BackwardInput<double>&, const Stage<double>&, const Chunk&,
                           const ChannelParameters<double>&, bool,
                           const std::optional<Operand<double>>&, BackwardSums*);

}  // namespace ssp
