#pragma once

#include <math.h>

#include "macros.h"

namespace ssp {

// 1 / sqrt(variance + eps), from the variance as it is returned.
template <class A>
SSP_HD A reciprocal_deviation(A variance, double eps) {
  return static_cast<A>(1.0 / ::sqrt(static_cast<double>(variance) + eps));
}

// reference._xhat
template <class A>
SSP_HD A normalized(A u, A mean, A rstd) {
  return (u - mean) * rstd;
}

// reference._affine. The backward recomputes y by this very expression, so that its mask is the
// forward's bit for bit.
template <class A>
SSP_HD A affine(A xhat, A gamma, A beta) {
  return xhat * gamma + beta;
}

// reference.norm_act_backward with fixed statistics.
template <class A>
SSP_HD A input_gradient(A dy, A rstd, A gamma) {
  return rstd * (gamma * dy);
}

// reference.group_norm_act_backward, and reference.norm_act_backward with sums, whose group is one
// channel. The means are those of gamma dy and gamma dy xhat over the elements that share
// statistics.
template <class A>
SSP_HD A input_gradient(A dy, A xhat, A rstd, A gamma, A mean_dy, A mean_dy_xhat) {
  return rstd * (gamma * dy - mean_dy - xhat * mean_dy_xhat);
}

}  // namespace ssp
