#pragma once

#include "exponential.h"
#include "macros.h"

namespace ssp {

// Indices into _ops.ACTIVATIONS.
enum Activation : int { kIdentity = 0, kRelu = 1, kLeakyRelu = 2, kSilu = 3 };
constexpr int kActivations = 4;
constexpr double kLeakyReluSlope = 0.01;

// The mask bit of a piecewise linear activation; true for NaN, so that NaN passes.
template <class A>
SSP_HD bool is_positive(A y) {
  return !(y <= A(0));
}

// reference.activate
template <int kActivation, class A>
SSP_HD A activate(A y) {
  if constexpr (kActivation == kRelu) {
    return is_positive(y) ? y : A(0);
  } else if constexpr (kActivation == kLeakyRelu) {
    return is_positive(y) ? y : A(kLeakyReluSlope) * y;
  } else if constexpr (kActivation == kSilu) {
    return y / (A(1) + exponential(-y));
  } else {
    return y;
  }
}

// reference.masked: selected, not multiplied, because inf * 0 is NaN.
template <int kActivation, class A>
SSP_HD A masked(A dz, bool positive) {
  if constexpr (kActivation == kRelu) {
    return positive ? dz : A(0);
  } else if constexpr (kActivation == kLeakyRelu) {
    return positive ? dz : A(kLeakyReluSlope) * dz;
  } else {
    return dz;
  }
}

// reference.activation_backward: dz act'(y).
template <int kActivation, class A>
SSP_HD A activation_backward(A dz, A y) {
  if constexpr (kActivation == kSilu) {
    const A sigmoid = A(1) / (A(1) + exponential(-y));
    return dz * (sigmoid * (A(1) + y * (A(1) - sigmoid)));
  } else {
    return masked<kActivation>(dz, is_positive(y));
  }
}

}  // namespace ssp
