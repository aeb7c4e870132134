#pragma once

#include "macros.h"

namespace ssp {

// Mean, sum of squared deviations from it, and number of elements of a set.
struct Moments {
  double mean = 0;
  double m2 = 0;
  double count = 0;
};

// The moments of a set from its mean and the sum of (element - centre)^2, for a centre near it.
SSP_HD Moments moments_about(double centre, double mean, double squares, double count) {
  const double m2 = squares - count * ((mean - centre) * (mean - centre));
  return {mean, m2 < 0 ? 0 : m2, count};
}

// The moments of the union of two sets: T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae
// and a Pairwise Algorithm for Computing Sample Variances" (1979).
SSP_HD Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const double count = a.count + b.count;
  const double weight = b.count / count;
  const double delta = b.mean - a.mean;
  return {(1 - weight) * a.mean + weight * b.mean, a.m2 + b.m2 + delta * delta * (a.count * weight),
          count};
}

}  // namespace ssp
