#pragma once

#include "macros.h"

namespace ssp {

// min(max(value, low), high) as torch.clamp defines it: NaN if any of the three is NaN.
template <class A>
SSP_HD A clamp(A value, A low, A high) {
  const A raised = value < low || low != low ? low : value;
  return raised > high || high != high ? high : raised;
}

// reference.linf_step. sign(0) and sign(NaN) are 0, as in torch.sign.
template <class A>
SSP_HD A linf_step(A x_adv, A grad, A x, A step_size, A eps, A low, A high) {
  const A sign = static_cast<A>(grad > A(0)) - static_cast<A>(grad < A(0));
  const A stepped = x_adv + step_size * sign;
  return clamp(clamp(stepped, x - eps, x + eps), low, high);
}

// reference.l2_step before its projection: the distance from x after the step. `length` is the
// norm of the sample's gradient; a zero (or NaN) gradient moves nothing.
template <class A>
SSP_HD A l2_displacement(A x_adv, A grad, A x, A step_size, A length) {
  const A direction = length > A(0) ? grad / length : A(0);
  return x_adv + step_size * direction - x;
}

// reference.l2_step: the projection onto the eps ball around x (`shrink` = eps / norm of the
// sample's displacement where that is longer, else 1) and the clipping.
template <class A>
SSP_HD A l2_projection(A x, A displacement, A shrink, A low, A high) {
  return clamp(x + displacement * shrink, low, high);
}

}  // namespace ssp
