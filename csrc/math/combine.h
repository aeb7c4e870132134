#pragma once

#include "macros.h"

namespace ssp {

constexpr int kMaxTerms = 6;  // _ops.MAX_TERMS

// A sum with one more term.
template <class A>
SSP_HD A plus_term(A total, A coefficient, A term) {
  return total + coefficient * term;
}

// reference._weighted_sum: c_0 t_0 + c_1 t_1 + ..., added in this order.
template <int kCount, class A>
SSP_HD A weighted_sum(const A (&coefficients)[kCount], const A (&terms)[kCount]) {
  A total = coefficients[0] * terms[0];
  for (int k = 1; k < kCount; ++k) {
    total = plus_term(total, coefficients[k], terms[k]);
  }
  return total;
}

}  // namespace ssp
