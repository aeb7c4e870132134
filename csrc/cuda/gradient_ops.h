#pragma once

#include "../ops.h"
#include "norm_backward.h"
#include "tensors.h"

namespace ssp {

// The arguments that the backward ops share: checked, and as the kernels take them.
struct GradientArguments {
  // Where u is given, in its layout.
  GradientArguments(const char* op, const Tensor& dz, double scale,
                    const OptionalTensor& scale_tensor, const Tensor& u, int64_t activation);
  // Else in the layout of the mask, if there is one, or of dz.
  GradientArguments(const char* op, const Tensor& dz, double scale,
                    const OptionalTensor& scale_tensor, bool rows, int64_t activation);

  // `shape`: of mean and rstd.
  void set_statistics(const OptionalTensor& mean, const Tensor& rstd,
                      const std::vector<int64_t>& shape, const OptionalTensor& gamma,
                      const OptionalTensor& beta);
  TermsParams extras(const std::vector<Tensor>& extras, const Coefficients& coefficients,
                     const OptionalTensor& tensor, ScalarType du_dtype);
  Tensor empty_like(ScalarType dtype) const;
  // z, if it is wanted; `z` says where to write it.
  Tensor make_z(bool wanted);

  const char* op;
  DeviceGuard guard;
  Operands operands;
  Tensor like;
  Extent extent;
  NormGradient params;
  Operand z;
};

}  // namespace ssp
