#pragma once

#include <cstddef>

#include "geometry.h"

namespace ssp {

// A launch whose blocks hold the whole tensor on chip, if it fits.
struct OnChipPlan {
  bool fits = false;
  Geometry geometry{};
  size_t shared = 0;  // bytes a block
};

}  // namespace ssp
