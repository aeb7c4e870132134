#include "tensors.h"

#include <sstream>

namespace ssp {
namespace {

void check_floating_cpu(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be a CPU tensor like the others");
  check_floating(op, name, tensor.scalar_type());
}

std::string text_of(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  for (size_t d = 0; d < shape.size(); ++d) text << (d ? ", " : "[") << shape[d];
  return text.str() + "]";
}

}  // namespace

bool common_rows(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    if (is_rows(tensor)) return true;
  }
  return false;
}

ScalarType stage_dtype(const char* op, const std::vector<Tensor>& terms) {
  ScalarType dtype = terms[0].scalar_type();
  for (const Tensor& a : terms) {
    for (const Tensor& b : terms) {
      check_mixture(op, "terms", a.scalar_type(), "terms", b.scalar_type());
      if (a.scalar_type() != b.scalar_type()) dtype = ScalarType::Float;
    }
  }
  return dtype;
}

Tensor empty_shape(const std::vector<int64_t>& shape, ScalarType dtype) {
  const std::vector<int64_t> strides = dense_strides(shape, false);
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), code,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor unwanted(ScalarType dtype) { return empty_shape({0}, dtype); }

Tensor empty_mask(const Extent& extent) {
  if (extent.rows) {
    return empty_shape({extent.n * extent.s, (extent.c + 7) / 8}, ScalarType::Byte);
  }
  return empty_shape({extent.n, extent.c, (extent.s + 7) / 8}, ScalarType::Byte);
}

void check_floating(const char* op, const char* name, ScalarType dtype) {
  const bool floating = dtype == ScalarType::Float || dtype == ScalarType::Double ||
                        dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(floating, op, ": ", name,
                  " must be float32, float64, float16 or bfloat16, but is ", dtype);
}

void check_activation(const char* op, const char* name, const Tensor& tensor) {
  check_floating_cpu(op, name, tensor);
  STD_TORCH_CHECK(tensor.dim() >= 2, op, ": ", name,
                  " must have the shape [N, C, *spatial], but has ", shape_of(tensor));
}

void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  check_activation(op, name, tensor);
  STD_TORCH_CHECK(same_shape(tensor, like), op, ": ", name, " must have the shape ", shape_of(like),
                  " of the other operands, but has ", shape_of(tensor));
}

void check_mixture(const char* op, const char* name, ScalarType dtype, const char* other_name,
                   ScalarType other) {
  const bool allowed =
      dtype == other || (dtype != ScalarType::Double && other != ScalarType::Double &&
                         (dtype == ScalarType::Float || other == ScalarType::Float));
  STD_TORCH_CHECK(allowed, op, ": ", name, " and ", other_name,
                  " must share a dtype, or be float32 with float16 or bfloat16, but are ", dtype,
                  " and ", other);
}

void check_shape(const char* op, const char* name, const Tensor& tensor,
                 const std::vector<int64_t>& shape) {
  check_floating_cpu(op, name, tensor);
  STD_TORCH_CHECK(shape_vector(tensor) == shape, op, ": ", name, " must have the shape ",
                  text_of(shape), ", but has ", shape_of(tensor));
}

void check_activation_code(const char* op, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation < 4, op,
                  ": activation must be an index into ACTIVATIONS, from 0 to 3, but is ",
                  activation);
}

Extent extent_of(const Tensor& tensor, bool rows) {
  Extent extent{tensor.size(0), tensor.size(1), 1, rows};
  for (int64_t d = 2; d < tensor.dim(); ++d) extent.s *= tensor.size(d);
  return extent;
}

Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    default:
      return Dtype::kFloat;
  }
}

std::vector<double> values_of(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be a CPU tensor like the others");
  const int64_t count = tensor.numel();
  if (tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous()) {
    const float* values = static_cast<const float*>(tensor.const_data_ptr());
    return std::vector<double>(values, values + count);
  }
  Tensor converted = empty_shape(shape_vector(tensor), ScalarType::Double);
  torch::stable::copy_(converted, tensor);
  const double* values = static_cast<const double*>(converted.const_data_ptr());
  return std::vector<double>(values, values + count);
}

std::vector<double> numbers_or(const char* op, const char* name, const std::vector<double>& numbers,
                               const OptionalTensor& tensor, size_t count) {
  std::vector<double> values = tensor.has_value() ? values_of(op, name, *tensor) : numbers;
  STD_TORCH_CHECK(values.size() == count, op, ": ", name, " must hold ", count,
                  " value(s), one per operand, but holds ", values.size());
  return values;
}

double number_or(const char* op, const char* name, double number, const OptionalTensor& tensor) {
  return numbers_or(op, name, {number}, tensor, 1)[0];
}

}  // namespace ssp
