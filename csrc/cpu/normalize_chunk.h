#pragma once

// Normalization and activation of a stage, chunk by chunk.

#include "math/normalize.h"
#include "stage.h"

namespace ssp {

// Vectors over channels, as the runs of a partition take them.
template <class A>
struct ChannelParameters {
  ChannelParameters(const Partition& partition, const std::vector<A>& mean_values,
                    const std::vector<A>& rstd_values, const std::vector<A>& gamma_values,
                    const std::vector<A>& beta_values)
      : mean(partition.expand(mean_values)),
        rstd(partition.expand(rstd_values)),
        gamma(partition.expand(gamma_values)),
        beta(partition.expand(beta_values)),
        per_element(partition.per_element()) {}

  Parameters<A> at(int64_t i) const {
    return {mean.data() + i,
            rstd.data() + i,
            gamma.data() + i,
            beta.data() + i,
            mean_dy.empty() ? nullptr : mean_dy.data() + i,
            mean_dy_xhat.empty() ? nullptr : mean_dy_xhat.data() + i,
            per_element};
  }

  std::vector<A> mean;
  std::vector<A> rstd;
  std::vector<A> gamma;
  std::vector<A> beta;
  std::vector<A> mean_dy;  // empty with fixed statistics
  std::vector<A> mean_dy_xhat;
  bool per_element;
};

// Where a run's mask bits lie: every plane (or row) starts a byte of its own.
struct MaskLayout {
  explicit MaskLayout(const Extent& e) : segment(e.rows ? e.c : e.s), bytes((segment + 7) / 8) {}

  // Calls f(byte, done, length) for the pieces of a run that lie in one segment each.
  template <class F>
  void for_each_piece(int64_t offset, int64_t n, const F& f) const {
    if (segment % 8 == 0) return f(offset / 8, 0, n);
    for (int64_t done = 0; done < n;) {
      const int64_t begin = (offset + done) % segment;
      const int64_t length = std::min(n - done, segment - begin);
      f((offset + done) / segment * bytes + begin / 8, done, length);
      done += length;
    }
  }

  int64_t segment;
  int64_t bytes;
};

template <class A>
struct NormalizeOutput {
  NormalizeOutput(const Partition& partition, const Tensor& z_tensor, const OptionalTensor& mask)
      : z(z_tensor),
        bits(mask.has_value() ? static_cast<uint8_t*>(mask->mutable_data_ptr()) : nullptr),
        layout(partition.extent()) {}
  Operand<A> z;
  uint8_t* bits;
  MaskLayout layout;
};

template <class A>
void normalize_chunk(const Stage<A>& stage, const Chunk& chunk,
                     const ChannelParameters<A>& parameters, int activation,
                     const NormalizeOutput<A>& output, StageScratch<A>& scratch) {
  const TileKernels<A>& kernels = tiles<A>();
  alignas(64) A buffer[kTile];
  for_each_run(chunk, parameters.per_element, [&](int64_t offset, int64_t n, int64_t parameter) {
    const A* u = stage.run(offset, n, scratch);
    A* z = output.z.target(offset, buffer);
    kernels.normalize_act(activation, parameters.at(parameter), u, z, n);
    if (output.bits != nullptr) {
      output.layout.for_each_piece(offset, n, [&](int64_t byte, int64_t done, int64_t length) {
        kernels.pack_mask(z + done, output.bits + byte, length);
      });
    }
    output.z.store(offset, z, n);
  });
}

}  // namespace ssp
