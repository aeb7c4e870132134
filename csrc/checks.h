#pragma once

// What the ops of both libraries ask of their arguments, and the shapes and dtypes that follow from
// them: _layout.py and _ops.py in C++.

#include <optional>
#include <string>
#include <vector>

#include "errors.h"
#include "extent.h"
#include "layout.h"
#include "math/activation.h"

namespace ssp {

using OptionalTensor = std::optional<Tensor>;
using OptionalDtype = std::optional<ScalarType>;

// Raises unless the library's kernels can read `tensor` where it lies.
void check_device(const char* op, const char* name, const Tensor& tensor);

inline void check_floating(const char* op, const char* name, ScalarType dtype) {
  const bool floating = dtype == ScalarType::Float || dtype == ScalarType::Double ||
                        dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  SSP_CHECK(floating, op, ": ", name, " must be float32, float64, float16 or bfloat16, but is ",
            dtype);
}

// Raises unless `tensor` is a floating point activation.
inline void check_activation(const char* op, const char* name, const Tensor& tensor) {
  check_device(op, name, tensor);
  check_floating(op, name, tensor.scalar_type());
  SSP_CHECK(tensor.dim() >= 2, op, ": ", name, " must have the shape [N, C, *spatial], but has ",
            shape_of(tensor));
}

// Raises unless `tensor` is an activation of `like`'s shape.
inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  check_activation(op, name, tensor);
  SSP_CHECK(same_shape(tensor, like), op, ": ", name, " must have the shape ", shape_of(like),
            " of the other operands, but has ", shape_of(tensor));
}

// Raises where float64 meets a narrower dtype, or float16 meets bfloat16.
inline void check_mixture(const char* op, const char* name, ScalarType dtype,
                          const char* other_name, ScalarType other) {
  const bool allowed =
      dtype == other || (dtype != ScalarType::Double && other != ScalarType::Double &&
                         (dtype == ScalarType::Float || other == ScalarType::Float));
  SSP_CHECK(allowed, op, ": ", name, " and ", other_name,
            " must share a dtype, or be float32 with float16 or bfloat16, but are ", dtype, " and ",
            other);
}

// Raises unless `tensor` is floating point and of this shape.
inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        const std::vector<int64_t>& shape) {
  check_device(op, name, tensor);
  check_floating(op, name, tensor.scalar_type());
  SSP_CHECK(shape_vector(tensor) == shape, op, ": ", name, " must have the shape ", text_of(shape),
            ", but has ", shape_of(tensor));
}

inline void check_operands(const char* op, const char* name, size_t count, size_t least,
                           size_t most) {
  SSP_CHECK(least <= count && count <= most, op, ": ", name, " must hold ", least, " to ", most,
            " tensors, but holds ", count);
}

// Raises unless there is one number for each operand.
inline void check_count(const char* op, const char* name, int64_t values, size_t count) {
  SSP_CHECK(values == static_cast<int64_t>(count), op, ": ", name, " must hold ", count,
            " value(s), one per operand, but holds ", values);
}

inline void check_activation_code(const char* op, int64_t activation) {
  SSP_CHECK(activation >= 0 && activation < kActivations, op,
            ": activation must be an index into ACTIVATIONS, from 0 to 3, but is ", activation);
}

inline void check_eps(const char* op, double eps) {
  SSP_CHECK(eps >= 0, op, ": eps must be at least 0, but is ", eps);
}

inline void check_groups(const char* op, int64_t num_groups, int64_t channels) {
  SSP_CHECK(num_groups > 0 && channels % num_groups == 0, op, ": num_groups must divide the ",
            channels, " channels, but is ", num_groups);
}

inline void check_dz(const char* op, const Tensor& dz, const Tensor& u) {
  check_like(op, "dz", dz, u);
  check_mixture(op, "dz", dz.scalar_type(), "u", u.scalar_type());
}

// What norm_act_backward may be given together.
inline void check_norm_backward(const char* op, const OptionalTensor& u, const OptionalTensor& mask,
                                const OptionalTensor& mean, int64_t activation,
                                const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat) {
  SSP_CHECK(!(u.has_value() && mask.has_value()), op,
            ": u must be None where mask is given, but both are");
  SSP_CHECK(u.has_value() == mean.has_value() || mask.has_value(), op,
            ": mean must be given with u, and only then");
  SSP_CHECK(u.has_value() || mask.has_value() || activation == kIdentity, op,
            ": u or mask must be given, but both are None");
  SSP_CHECK(!mask.has_value() || activation != kSilu, op,
            ": mask must be None for silu, whose derivative is not one of two values");
  SSP_CHECK(sum_dy.has_value() == sum_dy_xhat.has_value(), op,
            ": sum_dy and sum_dy_xhat must be given together, but one is None");
  SSP_CHECK(u.has_value() || !sum_dy.has_value(), op,
            ": u must be given where sums are, but is None");
}

inline std::vector<int64_t> mask_shape(const Extent& extent) {
  if (extent.rows) return {extent.n * extent.s, (extent.c + 7) / 8};
  return {extent.n, extent.c, (extent.s + 7) / 8};
}

inline void check_mask(const char* op, const Tensor& mask, const Extent& extent) {
  check_device(op, "mask", mask);
  const std::vector<int64_t> shape = mask_shape(extent);
  SSP_CHECK(mask.scalar_type() == ScalarType::Byte && shape_vector(mask) == shape, op,
            ": mask must be uint8 of the shape ", text_of(shape), ", but is ", mask.scalar_type(),
            " of ", shape_of(mask));
}

inline void check_tracked(const char* op, const Tensor& tracked) {
  check_device(op, "num_batches_tracked", tracked);
  SSP_CHECK(tracked.scalar_type() == ScalarType::Long && tracked.numel() == 1, op,
            ": num_batches_tracked must be one int64, but is ", tracked.scalar_type(), " of ",
            shape_of(tracked));
}

inline bool common_rows(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    if (is_rows(tensor)) return true;
  }
  return false;
}

inline ScalarType stage_dtype(const char* op, const std::vector<Tensor>& terms) {
  ScalarType dtype = terms[0].scalar_type();
  for (const Tensor& a : terms) {
    for (const Tensor& b : terms) {
      check_mixture(op, "terms", a.scalar_type(), "terms", b.scalar_type());
      if (a.scalar_type() != b.scalar_type()) dtype = ScalarType::Float;
    }
  }
  return dtype;
}

// The dtype asked for, or `otherwise`.
inline ScalarType result_dtype(const char* op, const char* name, const OptionalDtype& asked,
                               ScalarType otherwise) {
  const ScalarType dtype = asked.value_or(otherwise);
  check_floating(op, name, dtype);
  check_mixture(op, name, dtype, "the operands", otherwise);
  return dtype;
}

inline Extent extent_of(const Tensor& tensor, bool rows) {
  Extent extent{tensor.size(0), tensor.size(1), 1, rows};
  for (int64_t d = 2; d < tensor.dim(); ++d) extent.s *= tensor.size(d);
  return extent;
}

}  // namespace ssp
