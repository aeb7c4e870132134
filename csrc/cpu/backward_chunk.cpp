#include "backward_chunk.h"

namespace ssp {
namespace {

// Rows whose products are held in cache before they are summed.
constexpr int64_t kReduceRows = 8;

}  // namespace

template <class A>
void reduce_chunk(const BackwardInput<A>& input, const Stage<A>& stage, const Chunk& chunk,
                  const ChannelParameters<A>& parameters, bool sum_u,
                  const std::optional<Operand<A>>& z, BackwardSums* sums) {
  const TileKernels<A>& kernels = tiles<A>();
  StageScratch<A> scratch;
  alignas(64) A buffer[kTile];
  alignas(64) A dy[kReduceRows * kTile];
  alignas(64) A dy_xhat[kReduceRows * kTile];
  const auto run = [&](int64_t offset, int64_t n, int64_t parameter, int64_t row) {
    const Parameters<A> p = parameters.at(parameter);
    const A* u = stage.run(offset, n, scratch);
    if (z.has_value()) {
      A* target = z->target(offset, buffer);
      kernels.normalize_act(input.activation, p, u, target, n);
      z->store(offset, target, n);
    }
    const A* dz = input.dz.load(offset, n, buffer);
    kernels.backward_terms(input.activation, p, input.scale, dz, u, dy + row * n, dy_xhat + row * n,
                           n);
    return u;
  };
  std::fill_n(sums, chunk.channels, BackwardSums{});

  if (!parameters.per_element) {
    for_each_run(chunk, false, [&](int64_t offset, int64_t n, int64_t parameter) {
      const A* u = run(offset, n, parameter, 0);
      sums->dy += kernels.run_sum(dy, n);
      sums->dy_xhat += kernels.run_sum(dy_xhat, n);
      if (sum_u) sums->u += kernels.run_sum(u, n);
    });
    return;
  }

  const int64_t width = chunk.width;
  double dy_columns[kTile] = {};
  double dy_xhat_columns[kTile] = {};
  double u_columns[kTile] = {};
  for (int64_t begin = 0; begin < chunk.rows; begin += kReduceRows) {
    const int64_t rows = std::min(kReduceRows, chunk.rows - begin);
    for (int64_t r = 0; r < rows; ++r) {
      const A* u =
          run(chunk.offset + (begin + r) * chunk.stride, width, chunk.parameter, r);
      if (sum_u) kernels.column_sums(u, 1, width, width, u_columns);
    }
    kernels.column_sums(dy, rows, width, width, dy_columns);
    kernels.column_sums(dy_xhat, rows, width, width, dy_xhat_columns);
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
