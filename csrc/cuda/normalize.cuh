#pragma once

// y = gamma xhat + beta, z = act(y) and the mask, unit by unit.

#include "../math/normalize.h"
#include "walk.cuh"

namespace ssp {

// Shared tables over the tile's channels, of Geometry::table() values each.
struct AffineTables {
  static constexpr int kTables = 4;

  SSP_DEVICE AffineTables(float* shared, int table)
      : mean(shared),
        rstd(mean + table),
        gamma(rstd + table),
        beta(gamma + table),
        after(beta + table) {}

  template <bool kRows>
  SSP_DEVICE void fill(const Walk<kRows>& walk, const Operand& gammas, const Operand& betas) const {
    fill_table(walk, gammas, 1, gamma);
    fill_table(walk, betas, 0, beta);
  }
  SSP_DEVICE float* end() const { return after; }

  float* mean;
  float* rstd;
  float* gamma;
  float* beta;
  float* after;
};

// The parameters of a unit.
template <bool kRows>
struct Affine {
  SSP_DEVICE Affine(const AffineTables& tables, int column)
      : mean(PerChannel<kRows>::of(tables.mean, column)),
        rstd(PerChannel<kRows>::of(tables.rstd, column)),
        gamma(PerChannel<kRows>::of(tables.gamma, column)),
        beta(PerChannel<kRows>::of(tables.beta, column)) {}

  SSP_DEVICE Affine(const PerChannel<kRows>& means, const PerChannel<kRows>& rstds,
                    const ChannelLoad<kRows>& gammas, const ChannelLoad<kRows>& betas)
      : mean(means), rstd(rstds), gamma(gammas.or_else(1)), beta(betas.or_else(0)) {}

  SSP_DEVICE float xhat(int e, float u) const { return normalized(u, mean[e], rstd[e]); }
  SSP_DEVICE float y(int e, float xhat) const { return affine(xhat, gamma[e], beta[e]); }
  SSP_DEVICE void y(const float (&u)[kUnit], float (&out)[kUnit]) const {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) out[e] = y(e, xhat(e, u[e]));
  }

  PerChannel<kRows> mean;
  PerChannel<kRows> rstd;
  PerChannel<kRows> gamma;
  PerChannel<kRows> beta;
};

// The parameters of the units of a thread that keeps to its channels.
template <bool kRows>
SSP_DEVICE Affine<kRows> affine_of(const Walk<kRows>& walk, const Operand& means,
                                   const Operand& rstds, const Operand& gammas,
                                   const Operand& betas) {
  const ChannelLoad<kRows> mean(means, walk);
  const ChannelLoad<kRows> rstd(rstds, walk);
  const ChannelLoad<kRows> gamma(gammas, walk);
  const ChannelLoad<kRows> beta(betas, walk);
  return Affine<kRows>(mean.or_else(0), rstd.or_else(1), gamma, beta);
}

// One bit an element, the first the lowest.
SSP_DEVICE uint8_t mask_bits(const float (&y)[kUnit], int length) {
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < kUnit; ++e) bits |= static_cast<uint32_t>(is_positive(y[e])) << e;
  return static_cast<uint8_t>(bits & ((1u << length) - 1));
}

SSP_DEVICE void activate_unit(int activation, float (&y)[kUnit]) {
  with_activation(activation, [&]<int kActivation>() {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) y[e] = activate<kActivation>(y[e]);
  });
}

}  // namespace ssp
