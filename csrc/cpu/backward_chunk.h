#pragma once

// The backward of normalization and activation, chunk by chunk: sums, and the input's gradient.

#include <algorithm>
#include <optional>
#include <vector>

#include "normalize_chunk.h"
#include "stage.h"

namespace ssp {

// Partial sums of one channel.
struct BackwardSums {
  double dy = 0;
  double dy_xhat = 0;
  double u = 0;

  BackwardSums& operator+=(const BackwardSums& other) {
    dy += other.dy;
    dy_xhat += other.dy_xhat;
    u += other.u;
    return *this;
  }
};

// What both passes read.
template <class A>
struct BackwardInput {
  Operand<A> dz;
  A scale;
  int activation;
};

// The later stages' gradients, sum_j e_j extra_j, added to the kernel's own part.
template <class A>
class Extras {
 public:
  Extras(const char* op, const std::vector<Tensor>& extras, const std::vector<double>& numbers,
         const OptionalTensor& tensor, const Tensor& like, bool rows, ScalarType du_dtype) {
    check_operands(op, "extras", extras.size(), 0, kMaxTerms);
    for (const double value :
         numbers_or(op, "extra_coefficients", numbers, tensor, extras.size())) {
      coefficients_.push_back(static_cast<A>(value));
    }
    coefficients_.push_back(A(1));
    for (const Tensor& extra : extras) {
      check_like(op, "extras", extra, like);
      check_mixture(op, "extras", extra.scalar_type(), "du", du_dtype);
      tensors_.push_back(dense(extra, rows));
      operands_.emplace_back(tensors_.back());
    }
  }

  // Writes own + sum_j e_j extra_j.
  void finish(const A* own, int64_t offset, int64_t n, const Operand<A>& du,
              StageScratch<A>& scratch, A* buffer) const {
    const int count = static_cast<int>(operands_.size());
    if (count == 0) return du.store(offset, own, n);
    const A* values[kMaxTerms + 1];
    for (int k = 0; k < count; ++k) values[k] = operands_[k].load(offset, n, scratch.terms[k]);
    values[count] = own;
    A* total = du.target(offset, buffer);
    tiles<A>().combine(count + 1, values, coefficients_.data(), nullptr, total, n);
    du.store(offset, total, n);
  }
  bool empty() const { return operands_.empty(); }

 private:
  std::vector<Tensor> tensors_;
  std::vector<Operand<A>> operands_;
  std::vector<A> coefficients_;
};

// Sums of the chunk's channels, that of u only if asked for, to sums[0 .. chunk.channels), and z
// again if it is wanted.
template <class A>
void reduce_chunk(const BackwardInput<A>& input, const Stage<A>& stage, const Chunk& chunk,
                  const ChannelParameters<A>& parameters, bool sum_u,
                  const std::optional<Operand<A>>& z, BackwardSums* sums);

// du over the chunk.
template <class A>
void backward_chunk(const BackwardInput<A>& input, const Stage<A>& stage, const Chunk& chunk,
                    const ChannelParameters<A>& parameters, const Extras<A>& extras,
                    const Operand<A>& du, StageScratch<A>& scratch) {
  alignas(64) A dz_buffer[kTile];
  alignas(64) A own_buffer[kTile];
  for_each_run(chunk, parameters.per_element, [&](int64_t offset, int64_t n, int64_t parameter) {
    const A* u = stage.run(offset, n, scratch);
    const A* dz = input.dz.load(offset, n, dz_buffer);
    A* own = extras.empty() ? du.target(offset, own_buffer) : own_buffer;
    tiles<A>().backward(input.activation, parameters.at(parameter), input.scale, dz, u, own, n);
    extras.finish(own, offset, n, du, scratch, dz_buffer);
  });
}

}  // namespace ssp
