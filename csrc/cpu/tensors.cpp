#include "tensors.h"

namespace ssp {

void check_device(const char* op, const char* name, const Tensor& tensor) {
  SSP_CHECK(tensor.is_cpu(), op, ": ", name, " must be a CPU tensor like the others");
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
  return empty_shape(mask_shape(extent), ScalarType::Byte);
}

void check_result(const char* op, const char* name, const Tensor& result, const Tensor& like,
                  bool rows, ScalarType dtype) {
  check_like(op, name, result, like);
  SSP_CHECK(result.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", but is ",
            result.scalar_type());
  SSP_CHECK(is_dense(result, rows), op, ": ", name, " must be dense in ",
            rows ? "rows (channels last)" : "planes (contiguous)", " as the operands, but is not");
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
  check_device(op, name, tensor);
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
  check_count(op, name, static_cast<int64_t>(values.size()), count);
  return values;
}

double number_or(const char* op, const char* name, double number, const OptionalTensor& tensor) {
  return numbers_or(op, name, {number}, tensor, 1)[0];
}

}  // namespace ssp
