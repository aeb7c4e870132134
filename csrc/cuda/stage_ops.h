#pragma once

#include "../ops.h"
#include "tensors.h"

namespace ssp {

// The arguments of the ops that begin with a stage: checked, and as the kernels take them.
struct StageArguments {
  StageArguments(const char* op, const std::vector<Tensor>& terms, const Coefficients& coefficients,
                 const OptionalTensor& coefficient_tensor, const OptionalTensor& channel_bias);

  Tensor empty_like(ScalarType result_dtype) const;
  // u, if it is wanted; the kernels are told where to write it.
  Tensor make_u(bool wanted);
  Tensor vector(const std::vector<int64_t>& shape) const { return empty_vector(like, shape); }

  const char* op;
  DeviceGuard guard;
  Operands operands;
  Tensor like;
  ScalarType dtype;
  Extent extent;
  StageParams params;
};

}  // namespace ssp
