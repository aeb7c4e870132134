#pragma once

// _layout.py for the op libraries: the two dense layouts of an activation, on any device.

#include <cstdint>
#include <string>
#include <vector>

#include "pytorch.h"

namespace ssp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A vector: 2.11's own view of the sizes can be neither compared nor printed.
inline std::vector<int64_t> shape_vector(const Tensor& tensor) {
  std::vector<int64_t> shape(tensor.dim());
  for (int64_t d = 0; d < tensor.dim(); ++d) shape[d] = tensor.size(d);
  return shape;
}

inline std::string text_of(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

inline std::string shape_of(const Tensor& tensor) { return text_of(shape_vector(tensor)); }

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return shape_vector(a) == shape_vector(b);
}

inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& shape, bool rows) {
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  const auto take = [&](int64_t d) {
    strides[d] = step;
    step *= shape[d] > 1 ? shape[d] : 1;
  };
  if (rows) take(1);
  for (int64_t d = static_cast<int64_t>(shape.size()) - 1; d >= 0; --d) {
    if (!(rows && d == 1)) take(d);
  }
  return strides;
}

inline bool is_dense(const Tensor& tensor, bool rows) {
  if (tensor.numel() == 0) return true;
  const std::vector<int64_t> strides = dense_strides(shape_vector(tensor), rows);
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != strides[d]) return false;
  }
  return true;
}

inline bool is_rows(const Tensor& tensor) {
  return tensor.dim() > 2 && !is_dense(tensor, false) && is_dense(tensor, true);
}

// An uninitialized dense tensor on `like`'s device.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, bool rows,
                    ScalarType dtype) {
  const std::vector<int64_t> strides = dense_strides(shape, rows);
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(), code, device_type,
      static_cast<int32_t>(like.get_device_index()), &handle));
  return Tensor(handle);
}

inline Tensor empty_like(const Tensor& like, bool rows) {
  return empty(like, shape_vector(like), rows, like.scalar_type());
}

// `tensor` itself where it is dense in this layout, else a dense copy.
inline Tensor dense(const Tensor& tensor, bool rows) {
  if (is_dense(tensor, rows)) return tensor;
  Tensor copy = empty_like(tensor, rows);
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace ssp
