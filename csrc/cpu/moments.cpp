// Statistics of a stage: two passes over blocks in cache, then Chan's merge. Never
// E[u^2] - E[u]^2.

#include "stage.h"

namespace ssp {
namespace {

template <class A>
Moments run_moments(const A* u, int64_t n) {
  const double count = static_cast<double>(n);
  const double mean = tiles<A>().run_sum(u, n) / count;
  const A centre = static_cast<A>(mean);
  return moments_about(centre, mean, tiles<A>().run_squares(u, n, centre), count);
}

// Adds the block's moments by channel.
template <class A>
void merge_columns(const Block<A>& block, const Chunk& chunk, Moments* moments) {
  const int64_t channels = chunk.channels;
  const double count = static_cast<double>(chunk.rows * (chunk.width / channels));
  double columns[kTile] = {};
  double means[kTile] = {};
  double squares[kTile] = {};
  A centres[kTile];
  tiles<A>().column_sums(block.data, chunk.rows, block.stride, chunk.width, columns);
  fold_columns(chunk, columns, means);
  for (int64_t c = 0; c < channels; ++c) means[c] *= 1 / count;
  for (int64_t j = 0; j < chunk.width;) {
    for (int64_t c = 0; c < channels; ++c) {
      const A centre = static_cast<A>(means[c]);
      for (int64_t i = 0; i < chunk.inner; ++i) centres[j++] = centre;
    }
  }
  std::fill_n(columns, chunk.width, 0.0);
  tiles<A>().column_squares(block.data, chunk.rows, block.stride, chunk.width, centres, columns);
  fold_columns(chunk, columns, squares);
  for (int64_t c = 0; c < channels; ++c) {
    moments[c] =
        merge(moments[c], moments_about(centres[c * chunk.inner], means[c], squares[c], count));
  }
}

}  // namespace

template <class A>
void chunk_moments(const Stage<A>& stage, bool per_element, const Chunk& chunk, Moments* moments) {
  StageScratch<A> scratch;
  alignas(64) A buffer[kBlock];
  std::fill_n(moments, chunk.channels, Moments{});
  if (!per_element) {
    for (int64_t first = 0; first < chunk.width; first += kBlock) {
      const int64_t n = std::min(kBlock, chunk.width - first);
      const Chunk part = chunk.part(0, 1, first, n);
      *moments = merge(*moments, run_moments(produce(stage, part, scratch, buffer).data, n));
    }
    return;
  }
  for (int64_t row = 0; row < chunk.rows; row += kBlockRows) {
    const Chunk part = chunk.part(row, std::min(kBlockRows, chunk.rows - row), 0, chunk.width);
    merge_columns(produce(stage, part, scratch, buffer), part, moments);
  }
}

template void chunk_moments(const Stage<float>&, bool, const Chunk&, Moments*);
template void chunk_moments(const Stage<double>&, bool, const Chunk&, Moments*);

}  // namespace ssp
