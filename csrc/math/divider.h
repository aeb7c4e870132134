#pragma once

#include <stdint.h>

#include "macros.h"

namespace ssp {

// Division of n < 2^31 by an invariant, without a division instruction: T. Granlund,
// P. L. Montgomery, "Division by Invariant Integers using Multiplication" (1994).
struct Divider {
  Divider() = default;
  explicit Divider(uint32_t by) : divisor(by) {
    while ((uint64_t{1} << shift) < by) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }

  SSP_HD uint32_t quotient(uint32_t n) const {
    const auto high = static_cast<uint32_t>((static_cast<uint64_t>(n) * magic) >> 32);
    return (high + n) >> shift;
  }

  uint32_t divisor = 1;
  uint32_t magic = 1;
  uint32_t shift = 0;
};

}  // namespace ssp
