#pragma once

// How the work on an activation is cut into chunks. Chunks depend on the shape alone, and partial
// sums are merged in their order: results are the same for any number of threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensors.h"
#include "tiles.h"

namespace ssp {

// `rows` runs of `width` elements, `stride` apart, first element at `offset`. Column j of a run
// belongs to channel (j / inner) % channels, counted from `channel`. `parameter` is where the run's
// parameters start in a vector from Partition::expand.
struct Chunk {
  int64_t offset;
  int64_t rows;
  int64_t stride;
  int64_t width;
  int64_t channel;
  int64_t channels;
  int64_t inner;
  int64_t parameter;
  int64_t slot;  // where its partial sums go, [slots, C]

  // Rows [begin, begin + count) and columns [first, first + columns) of the chunk.
  Chunk part(int64_t begin, int64_t count, int64_t first, int64_t columns) const {
    Chunk chunk = *this;
    chunk.offset += begin * stride + first;
    chunk.rows = count;
    chunk.width = columns;
    return chunk;
  }
  Chunk shifted(int64_t elements) const {
    Chunk chunk = *this;
    chunk.offset += elements;
    return chunk;
  }
};

class Partition {
 public:
  // Two paths. Planes: long runs inside one channel, whose parameters are single values. Columns:
  // the channels change along a run, whose parameters are vectors, repeated until it is about a
  // tile long; channels last, and planes too small to be runs.
  explicit Partition(const Extent& e)
      : extent_(e),
        // With many samples the cost of vectors is shared by them.
        per_element_(e.rows || e.s < 32 || (e.s < 128 && e.n >= 8)),
        inner_(e.rows ? 1 : e.s) {
    if (e.numel() == 0) return;
    if (!per_element_) {
      pieces_ = ceil_div(e.s, kPlanePiece);
      slots_ = e.n * pieces_;
      chunks_ = slots_ * e.c;
      return;
    }
    const int64_t unit = e.c * inner_;
    const int64_t units = e.numel() / unit;
    repeats_ = std::min(std::max<int64_t>(kTile / unit, 1), units);
    strip_ = unit <= kTile ? e.c : std::max<int64_t>(kTile / inner_, 1);
    strips_ = ceil_div(e.c, strip_);
    rows_ = units / repeats_;
    rest_ = units % repeats_;
    slots_ = ceil_div(rows_, kRows);
    chunks_ = slots_ * strips_;
    if (rest_ > 0) {
      ++slots_;
      ++chunks_;
    }
  }

  // Whether parameters are vectors along a run, from `expand`, or single values.
  bool per_element() const { return per_element_; }
  int64_t chunks() const { return chunks_; }
  int64_t slots() const { return slots_; }
  const Extent& extent() const { return extent_; }

  Chunk chunk(int64_t index) const {
    const Extent& e = extent_;
    if (!per_element_) {
      const int64_t piece = index % pieces_;
      const int64_t plane = index / pieces_;
      const int64_t begin = piece * kPlanePiece;
      const int64_t width = std::min(kPlanePiece, e.s - begin);
      const int64_t c = plane % e.c;
      const int64_t slot = plane / e.c * pieces_ + piece;
      return {plane * e.s + begin, 1, width, width, c, 1, width, c, slot};
    }
    const int64_t stride = repeats_ * e.c * inner_;
    const int64_t slot = index / strips_;
    if (slot * kRows >= rows_) {  // the last row, shorter than the others
      const int64_t width = rest_ * e.c * inner_;
      return {rows_ * stride, 1, stride, width, 0, e.c, inner_, 0, slot};
    }
    const int64_t c = index % strips_ * strip_;
    const int64_t channels = std::min(strip_, e.c - c);
    const int64_t row = slot * kRows;
    return {row * stride + c * inner_,
            std::min(kRows, rows_ - row),
            stride,
            repeats_ * channels * inner_,
            c,
            channels,
            inner_,
            c * inner_,
            slot};
  }

  // A per-channel vector as runs take it.
  template <class A>
  std::vector<A> expand(const std::vector<A>& vector) const {
    if (!per_element_) return vector;
    std::vector<A> expanded(std::max<int64_t>(repeats_ * extent_.c * inner_, 1));
    A* out = expanded.data();
    for (int64_t r = 0; r < repeats_; ++r) {
      for (const A value : vector) out = std::fill_n(out, inner_, value);
    }
    return expanded;
  }

 private:
  static constexpr int64_t kPlanePiece = 16384;
  static constexpr int64_t kRows = 64;
  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  Extent extent_;
  bool per_element_;
  int64_t inner_;
  int64_t pieces_ = 1;
  int64_t repeats_ = 1;
  int64_t strip_ = 1;
  int64_t strips_ = 1;
  int64_t rows_ = 0;
  int64_t rest_ = 0;
  int64_t slots_ = 0;
  int64_t chunks_ = 0;
};

// Adds the columns of a chunk, in order, to their channels' sums.
inline void fold_columns(const Chunk& chunk, const double* columns, double* sums) {
  for (int64_t j = 0; j < chunk.width;) {
    for (int64_t c = 0; c < chunk.channels; ++c) {
      for (int64_t i = 0; i < chunk.inner; ++i) sums[c] += columns[j++];
    }
  }
}

// Calls f(offset, n, parameter) for the runs of a chunk, at most kTile long.
template <class F>
void for_each_run(const Chunk& chunk, bool per_element, const F& f) {
  for (int64_t r = 0; r < chunk.rows; ++r) {
    for (int64_t j = 0; j < chunk.width; j += kTile) {
      f(chunk.offset + r * chunk.stride + j, std::min(kTile, chunk.width - j),
        chunk.parameter + (per_element ? j : 0));
    }
  }
}

// Calls f(first, last) for ranges of [0, count), on several threads where there is enough work.
template <class F>
void parallel_ranges(int64_t count, int64_t elements, const F& f) {
  constexpr int64_t kElementsPerThread = 32768;
  if (count == 0) return;
  const int64_t each = std::max<int64_t>(elements / count, 1);
  torch::stable::parallel_for(0, count, std::max<int64_t>(kElementsPerThread / each, 1), f);
}

}  // namespace ssp
