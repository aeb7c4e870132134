#pragma once

// Statistics without cancellation. A block subtracts its own mean before it squares; blocks are
// merged about their common mean, which is Chan's formula for any number of sets at once.

#include "../math/moments.h"
#include "../math/normalize.h"
#include "block_sum.cuh"
#include "moments.h"

namespace ssp {

// Moments of a thread's elements by channel: sums, and Welford's mean and squared deviations.
template <bool kRows>
struct ThreadMoments {
  SSP_DEVICE void add(const float (&u)[kUnit], int length) {
    if constexpr (kRows) {
      count += 1;
      const float share = 1 / count;
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        const float delta = u[e] - mean[e];
        sum[e] += u[e];
        mean[e] += delta * share;
        m2[e] += delta * (u[e] - mean[e]);
      }
    } else {
      float total = 0;
      float squares = 0;
#pragma unroll
      for (int e = 0; e < kUnit; ++e) total += e < length ? u[e] : 0;
      const float unit_mean = total / length;
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        const float deviation = e < length ? u[e] - unit_mean : 0;
        squares += deviation * deviation;
      }
      const float share = length / (count + length);
      const float delta = unit_mean - mean[0];
      sum[0] += total;
      mean[0] += delta * share;
      m2[0] += squares + delta * delta * (count * share);
      count += length;
    }
  }

  // Squared deviations from `centre`, from those from the thread's mean.
  SSP_DEVICE PerChannel<kRows> squares_about(const PerChannel<kRows>& centre) const {
    auto squares = PerChannel<kRows>::of(0);
    if (count == 0) return squares;
#pragma unroll
    for (int e = 0; e < PerChannel<kRows>::kWidth; ++e) {
      const float shift = mean[e] - centre[e];
      squares[e] = m2[e] + count * (shift * shift);
    }
    return squares;
  }

  PerChannel<kRows> sum = PerChannel<kRows>::of(0);
  PerChannel<kRows> mean = PerChannel<kRows>::of(0);
  PerChannel<kRows> m2 = PerChannel<kRows>::of(0);
  float count = 0;
};

// The mean of a block's elements by channel, from the totals of their sums, to a table.
template <bool kRows>
SSP_DEVICE void block_means(const Walk<kRows>& walk, const SumScratch& scratch, float* means) {
  const double count = static_cast<double>(walk.part_elements(walk.part));
  for (int i = threadIdx.x; i < walk.g.tile_channels; i += blockDim.x) {
    means[i] = static_cast<float>(scratch.totals[i] / count);
  }
  __syncthreads();
}

// The block's partial moments: its means, and the totals of the squared deviations from them.
template <bool kRows>
SSP_DEVICE void write_partial(const Walk<kRows>& walk, const SumScratch& scratch,
                              const float* means, MomentPartial* partials) {
  MomentPartial* own = partials + walk.part * walk.g.extent.c + walk.first_channel();
  for (int i = threadIdx.x; i < walk.columns(); i += blockDim.x) {
    own[i] = {means[i], static_cast<float>(scratch.totals[i])};
  }
}

// Merges the partial moments of the tile's parts: means and reciprocal deviations to tables. The
// first part also writes them out. `means` and `rstds` hold tile_channels values each.
template <bool kRows>
SSP_DEVICE void merge_partials(const Walk<kRows>& walk, const BatchStatistics& statistics,
                               const SumScratch& scratch, float* means, float* rstds) {
  const int parts = walk.g.parts;
  const int columns = walk.columns();
  const double count = static_cast<double>(walk.g.extent.per_channel());
  const MomentPartial* partials = statistics.partials + walk.first_channel();
  const auto partial = [&](int part, int column) {
    return partials[part * walk.g.extent.c + column];
  };
  // The parts' means are about that of the first: in double, no digit of a float is lost.
  sum_columns<2>(parts, columns, scratch, [&](int part, int column, double* sums) {
    const MomentPartial own = partial(part, column);
    const double shift = static_cast<double>(own.mean) - partial(0, column).mean;
    const double weighted = static_cast<double>(walk.part_elements(part)) * shift;
    sums[0] += weighted;
    sums[1] += own.m2 + weighted * shift;
  });
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    const double centre = partial(0, i).mean;
    const double shift = scratch.totals[i] / count;
    const Moments merged =
        moments_about(centre, centre + shift, scratch.totals[columns + i], count);
    const float variance = static_cast<float>(merged.m2 / count);
    means[i] = static_cast<float>(merged.mean);
    rstds[i] = reciprocal_deviation(variance, statistics.eps);
    if (walk.part != 0) continue;
    const int64_t channel = walk.first_channel() + i;
    statistics.mean[channel] = means[i];
    statistics.variance[channel] = variance;
    if (statistics.rstd != nullptr) statistics.rstd[channel] = rstds[i];
  }
  __syncthreads();
}

}  // namespace ssp
