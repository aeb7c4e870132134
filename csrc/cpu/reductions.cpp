// reference.channel_sum and stage_dots.

#include "ops.h"
#include "stage.h"

namespace ssp {
namespace {

template <class A>
void chunk_sums(const Stage<A>& stage, bool per_element, const Chunk& chunk, double* sums) {
  const TileKernels<A>& kernels = tiles<A>();
  StageScratch<A> scratch;
  alignas(64) A buffer[kBlock];
  if (!per_element) {
    for (int64_t first = 0; first < chunk.width; first += kBlock) {
      const int64_t n = std::min(kBlock, chunk.width - first);
      const Chunk part = chunk.part(0, 1, first, n);
      *sums += kernels.run_sum(produce(stage, part, scratch, buffer).data, n);
    }
    return;
  }
  double columns[kTile] = {};
  for (int64_t row = 0; row < chunk.rows; row += kBlockRows) {
    const Chunk part = chunk.part(row, std::min(kBlockRows, chunk.rows - row), 0, chunk.width);
    const Block<A> block = produce(stage, part, scratch, buffer);
    kernels.column_sums(block.data, part.rows, block.stride, part.width, columns);
  }
  fold_columns(chunk, columns, sums);
}

}  // namespace

Tensor channel_sum(const Tensor& g) {
  const StageArguments arguments("channel_sum", {g}, {1.0}, std::nullopt, std::nullopt);
  return with_arithmetic(g.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Partition partition(arguments.extent);
    const Stage<A> stage(arguments);
    const int64_t channels = arguments.extent.c;
    std::vector<double> partial(partition.slots() * channels);
    parallel_ranges(partition.chunks(), g.numel(), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Chunk chunk = partition.chunk(i);
        chunk_sums(stage, partition.per_element(), chunk,
                   partial.data() + chunk.slot * channels + chunk.channel);
      }
    });
    std::vector<double> total(channels);
    for (size_t i = 0; i < partial.size(); ++i) total[i % channels] += partial[i];
    return tensor_of<A>(total, {channels});
  });
}

Tensor stage_dots(const Tensor& g, const std::vector<Tensor>& terms) {
  const char* op = "stage_dots";
  check_activation(op, "g", g);
  check_operands(op, "terms", terms.size(), 1, kMaxTerms);
  std::vector<Tensor> operands = {g};
  operands.insert(operands.end(), terms.begin(), terms.end());
  const bool rows = common_rows(operands);
  for (Tensor& operand : operands) {
    check_like(op, "terms", operand, g);
    check_mixture(op, "terms", operand.scalar_type(), "g", g.scalar_type());
    operand = dense(operand, rows);
  }
  return with_arithmetic(g.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    constexpr int64_t kPiece = 32 * kTile;
    const std::vector<Operand<A>> values(operands.begin(), operands.end());
    const int64_t count = static_cast<int64_t>(terms.size());
    const int64_t numel = g.numel();
    const int64_t pieces = (numel + kPiece - 1) / kPiece;
    std::vector<double> partial(pieces * count);
    parallel_ranges(pieces, numel, [&](int64_t first, int64_t last) {
      alignas(64) A g_buffer[kTile];
      alignas(64) A term_buffer[kTile];
      for (int64_t piece = first; piece < last; ++piece) {
        const int64_t end = std::min(numel, (piece + 1) * kPiece);
        for (int64_t offset = piece * kPiece; offset < end; offset += kTile) {
          const int64_t n = std::min(kTile, end - offset);
          const A* gradient = values[0].load(offset, n, g_buffer);
          for (int64_t k = 0; k < count; ++k) {
            const A* term = values[k + 1].load(offset, n, term_buffer);
            partial[piece * count + k] += tiles<A>().run_dot(gradient, term, n);
          }
        }
      }
    });
    std::vector<double> total(count);
    for (size_t i = 0; i < partial.size(); ++i) total[i % count] += partial[i];
    return tensor_of<A>(total, {count});
  });
}

}  // namespace ssp
