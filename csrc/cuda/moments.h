#pragma once

namespace ssp {

// Of the elements of one channel in one block.
struct MomentPartial {
  float mean;
  float m2;
};

// Batch statistics from partial ones, [parts, C], and where to write them, [C]. rstd may be null.
struct BatchStatistics {
  MomentPartial* partials = nullptr;
  double eps = 0;
  float* mean = nullptr;
  float* variance = nullptr;
  float* rstd = nullptr;
};

}  // namespace ssp
