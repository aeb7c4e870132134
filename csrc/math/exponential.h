#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "macros.h"

namespace ssp {

template <class To, class From>
SSP_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

SSP_HD double exponential(double x) { return ::exp(x); }

// exp(x) without branches or calls, so that loops over it vectorise. x = k log(2) + r with log(2)
// in two parts (Cody and Waite), exp(r) by its Taylor polynomial on |r| <= log(2) / 2, and 2^k in
// two factors, because k reaches 128 and the denormals.
SSP_HD float exponential(float x) {
  // Beyond these the result is inf or 0. NaN fails both comparisons and stays.
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + rounder;
  const float k = shifted - rounder;
  const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = (p * (r * r) + r) + 1.0f;
  // Unsigned, because the integer of a NaN is arbitrary.
  const uint32_t exponent = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(rounder);
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(exponent) >> 1);
  const float first = bit_cast<float>((half + 127u) << 23);
  const float second = bit_cast<float>((exponent - half + 127u) << 23);
  return p * first * second;
}

}  // namespace ssp
