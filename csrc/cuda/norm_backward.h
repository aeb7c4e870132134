#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "geometry.h"
#include "operand.h"

namespace ssp {

// Of the elements of one channel in one block.
struct SumPartial {
  float dy;
  float dy_xhat;
};

// What both passes read. The scale is `scale_tensor`'s value where it is given.
struct NormGradient {
  Operand dz;
  float scale = 1;
  Operand scale_tensor;
  Operand u;
  Operand mean;
  Operand rstd;
  Operand gamma;
  Operand beta;
  int activation = 0;
};

// Sums by channel, from partial ones, [parts, C], and where to write them, [C].
struct GradientSums {
  SumPartial* partials = nullptr;
  float* dy = nullptr;
  float* dy_xhat = nullptr;
};

// reference.norm_act_backward_reduce. sums.partials is scratch for geometry.parts * C values.
struct NormReduceParams {
  NormGradient gradient;
  Operand z;  // z again; not wanted where data is null
  Geometry geometry;
  GradientSums sums;
};

// reference.norm_act_backward. dy follows from the mask where u.data is null. The sums are given in
// `sum_dy` and `sum_dy_xhat`, or merged from sums.partials, left by the reduction with the same
// geometry, or, where all are null, there are none: fixed statistics.
struct NormBackwardParams {
  NormGradient gradient;
  const uint8_t* mask = nullptr;
  Operand sum_dy;
  Operand sum_dy_xhat;
  double count = 1;
  Operand count_tensor;
  TermsParams extras;
  Operand du;
  Geometry geometry;
  GradientSums sums;
};

Geometry norm_reduce_geometry(const Extent& extent, const Device& device);
Geometry norm_backward_geometry(const Extent& extent, const Device& device);

// Partial sums alone: what launch_norm_backward merges.
cudaError_t launch_norm_reduce_partials(const NormReduceParams& params, cudaStream_t stream);
// Partial sums, merged and written.
cudaError_t launch_norm_reduce(const NormReduceParams& params, cudaStream_t stream);
cudaError_t launch_norm_backward(const NormBackwardParams& params, cudaStream_t stream);

}  // namespace ssp
