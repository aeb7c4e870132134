#pragma once

// Tensors as the kernels take them: checked, dense in one of the two layouts of _layout.py.

#include <cstdint>
#include <vector>

#include "checks.h"
#include "tiles.h"

namespace ssp {

Tensor empty_shape(const std::vector<int64_t>& shape, ScalarType dtype);
Tensor unwanted(ScalarType dtype);
Tensor empty_mask(const Extent& extent);

// Raises unless `result`, of the caller's, is as the op would have made it.
void check_result(const char* op, const char* name, const Tensor& result, const Tensor& like,
                  bool rows, ScalarType dtype);

Dtype dtype_of(ScalarType dtype);

template <class A>
constexpr ScalarType scalar_type_of = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
template <class A>
constexpr Dtype dtype_for = sizeof(A) == 8 ? Dtype::kDouble : Dtype::kFloat;

// The values of a floating point (or integer) tensor of any dtype, in logical order.
std::vector<double> values_of(const char* op, const char* name, const Tensor& tensor);

// The values of `tensor` where it is given, else `numbers`; there must be `count`.
std::vector<double> numbers_or(const char* op, const char* name, const std::vector<double>& numbers,
                               const OptionalTensor& tensor, size_t count);
double number_or(const char* op, const char* name, double number, const OptionalTensor& tensor);

// A per-channel vector in A, `missing` throughout where it is not given.
template <class A>
std::vector<A> channel_vector(const char* op, const char* name, const OptionalTensor& tensor,
                              int64_t channels, double missing) {
  if (!tensor.has_value()) return std::vector<A>(channels, static_cast<A>(missing));
  check_shape(op, name, *tensor, {channels});
  const std::vector<double> values = values_of(op, name, *tensor);
  return std::vector<A>(values.begin(), values.end());
}

// A new tensor of A with these values.
template <class A, class Values>
Tensor tensor_of(const Values& values, const std::vector<int64_t>& shape) {
  Tensor tensor = empty_shape(shape, scalar_type_of<A>);
  A* out = static_cast<A*>(tensor.mutable_data_ptr());
  for (size_t i = 0; i < values.size(); ++i) out[i] = static_cast<A>(values[i]);
  return tensor;
}

// Calls f with a value of the arithmetic type of `dtype`.
template <class F>
auto with_arithmetic(ScalarType dtype, const F& f) {
  tiles<float>();  // choose the kernels here: an error must not arise on a worker thread
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

// A dense operand or result, read and written in the arithmetic type.
template <class A>
struct Operand {
  Operand() = default;
  Operand(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())),
        dtype(dtype_of(tensor.scalar_type())),
        bytes(static_cast<int64_t>(tensor.element_size())) {}

  bool is_native() const { return dtype == dtype_for<A>; }
  char* at(int64_t offset) const { return data + offset * bytes; }

  // n elements in A: in place where no conversion is needed, else in `buffer`.
  const A* load(int64_t offset, int64_t n, A* buffer) const {
    if (is_native()) return reinterpret_cast<const A*>(at(offset));
    tiles<A>().load(dtype, at(offset), buffer, n);
    return buffer;
  }
  // Where to write elements before `store`: their own place, or `buffer`.
  A* target(int64_t offset, A* buffer) const {
    return is_native() ? reinterpret_cast<A*>(at(offset)) : buffer;
  }
  void store(int64_t offset, const A* from, int64_t n) const {
    if (!is_native()) tiles<A>().store(dtype, from, at(offset), n);
  }

  char* data = nullptr;
  Dtype dtype = dtype_for<A>;
  int64_t bytes = sizeof(A);
};

}  // namespace ssp
