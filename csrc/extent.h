#pragma once

#include <cstdint>

#include "math/macros.h"

namespace ssp {

// An activation [N, C, *spatial]; s is the product of the spatial sizes.
struct Extent {
  int64_t n;
  int64_t c;
  int64_t s;
  bool rows;

  SSP_HD int64_t numel() const { return n * c * s; }
  SSP_HD int64_t per_channel() const { return n * s; }
  // Elements of a plane or row, whose mask starts a byte of its own.
  SSP_HD int64_t line_length() const { return rows ? c : s; }
};

}  // namespace ssp
