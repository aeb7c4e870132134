#include "tensors.h"

namespace ssp {

Storage storage_of(const char* op, const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::BFloat16:
      return Storage::kBfloat16;
    default:
      SSP_CHECK(false, op, ": ", name,
                " must be float32, float16 or bfloat16 on a CUDA device, but is ", dtype);
  }
}

Tensor empty_vector(const Tensor& like, const std::vector<int64_t>& shape) {
  return empty(like, shape, false, ScalarType::Float);
}

Tensor filled_vector(const Tensor& like, const std::vector<int64_t>& shape, double value) {
  Tensor filled = empty_vector(like, shape);
  torch::stable::fill_(filled, value);
  return filled;
}

Tensor unwanted(const Tensor& like, ScalarType dtype) { return empty(like, {0}, false, dtype); }

Extent checked_extent(const char* op, const Tensor& tensor, bool rows) {
  const Extent extent = extent_of(tensor, rows);
  const int64_t lines = rows ? extent.n * extent.s : extent.n * extent.c;
  const int64_t units = lines * ((extent.line_length() + 7) / 8);
  SSP_CHECK(units < kMaxUnits, op, ": tensors must have fewer than ", kMaxUnits,
            " runs of 8 elements, but the shape ", shape_of(tensor), " has ", units);
  return extent;
}

Extent merged_extent(Extent extent) {
  extent.rows = extent.rows || extent.s == 1;
  return extent;
}

Operand Operands::result(const Tensor& tensor) const {
  return {tensor.mutable_data_ptr(), storage_of(op_, "the result", tensor.scalar_type())};
}

Operand Operands::activation(const char* name, const Tensor& tensor, bool rows) {
  const Storage storage = storage_of(op_, name, tensor.scalar_type());
  kept_.push_back(dense(tensor, rows));
  return {kept_.back().data_ptr(), storage};
}

Operand Operands::flat(const char* name, const Tensor& tensor) {
  check_device(op_, name, tensor);
  check_floating(op_, name, tensor.scalar_type());
  kept_.push_back(torch::stable::contiguous(tensor));
  const bool is_double = tensor.scalar_type() == ScalarType::Double;
  return {kept_.back().data_ptr(),
          is_double ? Storage::kDouble : storage_of(op_, name, tensor.scalar_type())};
}

Operand Operands::vector(const char* name, const OptionalTensor& tensor,
                         const std::vector<int64_t>& shape) {
  if (!tensor.has_value()) return {};
  check_shape(op_, name, *tensor, shape);
  return flat(name, *tensor);
}

Operand Operands::number(const char* name, const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {};
  check_count(op_, name, tensor->numel(), 1);
  return flat(name, *tensor);
}

TermsParams Operands::terms(const char* name, const std::vector<Tensor>& tensors,
                            const Tensor& like, bool rows, const char* numbers_name,
                            const std::vector<double>& numbers, const OptionalTensor& tensor) {
  TermsParams terms;
  terms.count = static_cast<int>(tensors.size());
  for (int k = 0; k < terms.count; ++k) {
    check_like(op_, name, tensors[k], like);
    terms.terms[k] = activation(name, tensors[k], rows);
  }
  if (tensor.has_value()) {
    check_count(op_, numbers_name, tensor->numel(), tensors.size());
    if (terms.count > 0) terms.coefficient_tensor = flat(numbers_name, *tensor);
    return terms;
  }
  check_count(op_, numbers_name, static_cast<int64_t>(numbers.size()), tensors.size());
  for (int k = 0; k < terms.count; ++k) terms.coefficients[k] = static_cast<float>(numbers[k]);
  return terms;
}

}  // namespace ssp
