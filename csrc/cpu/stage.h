#pragma once

// A stage u = sum_k c_k t_k + channel_bias, produced run by run as the kernels need it.

#include <optional>
#include <vector>

#include "math/moments.h"
#include "partition.h"
#include "tensors.h"

namespace ssp {

// Rows and elements of the blocks over which moments are formed in two passes, held in cache.
constexpr int64_t kBlockRows = 32;
constexpr int64_t kBlock = kBlockRows * kTile;

template <class A>
struct StageScratch {
  alignas(64) A terms[kMaxTerms][kTile];
  alignas(64) A u[kTile];
  alignas(64) uint16_t stored[kTile];
};

// The arguments of the ops that begin with a stage, checked; `terms` dense in the common layout.
struct StageArguments {
  StageArguments(const char* op, const std::vector<Tensor>& terms,
                 const std::vector<double>& coefficients, const OptionalTensor& coefficient_tensor,
                 const OptionalTensor& channel_bias);

  const char* op;
  std::vector<Tensor> terms;
  std::vector<double> coefficients;
  OptionalTensor channel_bias;
  ScalarType dtype;
  Extent extent;

  Tensor empty_like(ScalarType result_dtype) const {
    return empty(terms[0], shape_vector(terms[0]), extent.rows, result_dtype);
  }
};

template <class A>
class Stage {
 public:
  explicit Stage(const StageArguments& arguments)
      : tensors_(arguments.terms),
        dtype_(dtype_of(arguments.dtype)),
        bias_layout_(arguments.extent) {
    for (size_t k = 0; k < tensors_.size(); ++k) {
      terms_.emplace_back(tensors_[k]);
      coefficients_.push_back(static_cast<A>(arguments.coefficients[k]));
    }
    if (arguments.channel_bias.has_value()) {
      bias_ = bias_layout_.expand(channel_vector<A>(arguments.op, "channel_bias",
                                                    arguments.channel_bias, arguments.extent.c, 0));
      coefficients_.push_back(A(1));
    }
  }

  // Nothing to compute: u is the only term.
  bool is_copy() const { return terms_.size() == 1 && coefficients_[0] == A(1) && bias_.empty(); }

  // Also store u, in its dtype.
  void write_to(const Tensor& u) { u_.emplace(u); }

  // Where u lies in A as a whole: already before any run is produced, or once it is written.
  const A* in_place() const {
    if (is_copy() && terms_[0].is_native()) return reinterpret_cast<const A*>(terms_[0].data);
    if (u_.has_value() && u_->is_native()) return reinterpret_cast<const A*>(u_->data);
    return nullptr;
  }

  // u as stored, n <= kTile elements of it, in A.
  const A* run(int64_t offset, int64_t n, StageScratch<A>& scratch) const {
    return run(offset, n, scratch, scratch.u);
  }

  // The same, written to `buffer` unless it is in place.
  const A* run(int64_t offset, int64_t n, StageScratch<A>& scratch, A* buffer) const {
    if (is_copy()) {
      if (u_.has_value()) std::copy_n(terms_[0].at(offset), n * u_->bytes, u_->at(offset));
      return terms_[0].load(offset, n, buffer);
    }
    const bool native = dtype_ == dtype_for<A>;
    A* u = native && u_.has_value() ? u_->target(offset, nullptr) : buffer;
    combine(offset, n, scratch, u);
    if (native) return u;
    void* stored = u_.has_value() ? u_->at(offset) : static_cast<void*>(scratch.stored);
    tiles<A>().store(dtype_, u, stored, n);
    tiles<A>().load(dtype_, stored, u, n);
    return u;
  }

 private:
  void combine(int64_t offset, int64_t n, StageScratch<A>& scratch, A* u) const {
    const int count = static_cast<int>(terms_.size());
    const A* values[kMaxTerms + 1];
    for (int k = 0; k < count; ++k) values[k] = terms_[k].load(offset, n, scratch.terms[k]);
    if (bias_.empty()) {
      tiles<A>().combine(count, values, coefficients_.data(), nullptr, u, n);
      return;
    }
    // A run may cross channels: cut it where the bias starts again, or changes.
    const Extent& e = bias_layout_.extent();
    const bool per_element = bias_layout_.per_element();
    const int64_t period = per_element ? static_cast<int64_t>(bias_.size()) : e.s;
    for (int64_t done = 0; done < n;) {
      const int64_t position = offset + done;
      const int64_t begin = position % period;
      const int64_t length = std::min(n - done, period - begin);
      if (per_element) {
        values[count] = bias_.data() + begin;
        tiles<A>().combine(count + 1, values, coefficients_.data(), nullptr, u + done, length);
      } else {
        const A* bias = bias_.data() + position / period % e.c;
        tiles<A>().combine(count, values, coefficients_.data(), bias, u + done, length);
      }
      for (int k = 0; k < count; ++k) values[k] += length;
      done += length;
    }
  }

  std::vector<Tensor> tensors_;
  std::vector<Operand<A>> terms_;
  std::vector<A> coefficients_;  // and 1 for a bias per element
  std::vector<A> bias_;
  std::optional<Operand<A>> u_;
  Dtype dtype_;
  Partition bias_layout_;
};

template <class A>
struct Block {
  const A* data;
  int64_t stride;
};

// u over a block of at most kBlock elements, in its own place or in `buffer`.
template <class A>
Block<A> produce(const Stage<A>& stage, const Chunk& block, StageScratch<A>& scratch, A* buffer) {
  A* next = buffer;
  for_each_run(block, true, [&](int64_t offset, int64_t n, int64_t) {
    const A* u = stage.run(offset, n, scratch, next);
    if (u == next) next += n;
  });
  const A* in_place = stage.in_place();
  if (in_place != nullptr) return {in_place + block.offset, block.stride};
  return {buffer, block.width};
}

// Moments of the chunk's channels, to moments[0 .. chunk.channels). Blocks of the chunk, small
// enough for the cache, are passed over twice, and merged.
template <class A>
void chunk_moments(const Stage<A>& stage, bool per_element, const Chunk& chunk, Moments* moments);

}  // namespace ssp
