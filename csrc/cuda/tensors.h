#pragma once

// Tensors as the CUDA kernels take them: checked, dense in one of the two layouts, in a parameter
// struct.

#include <vector>

#include "../checks.h"
#include "current.h"
#include "geometry.h"
#include "operand.h"

namespace ssp {

// The storage of an activation's dtype; raises for float64.
Storage storage_of(const char* op, const char* name, ScalarType dtype);

// Uninitialized results on `like`'s device.
Tensor empty_vector(const Tensor& like, const std::vector<int64_t>& shape);
Tensor filled_vector(const Tensor& like, const std::vector<int64_t>& shape, double value);
Tensor unwanted(const Tensor& like, ScalarType dtype);

inline float* floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// The extent of a tensor that is not too large for the kernels' 32 bit numbers of units. Where
// every plane has one element, planes and rows are the same memory, and rows the better path.
Extent checked_extent(const char* op, const Tensor& tensor, bool rows);
Extent merged_extent(Extent extent);

// Operands of one launch. Copies that had to be made live as long as this.
class Operands {
 public:
  explicit Operands(const char* op) : op_(op) {}

  Operand result(const Tensor& tensor) const;
  Operand activation(const char* name, const Tensor& tensor, bool rows);
  // A floating point vector of this shape, or none.
  Operand vector(const char* name, const OptionalTensor& tensor, const std::vector<int64_t>& shape);
  // One number on the device, or none.
  Operand number(const char* name, const OptionalTensor& tensor);
  // Terms of the shape of `like`, which mix with `dtype`.
  TermsParams terms(const char* name, const std::vector<Tensor>& tensors, const Tensor& like,
                    bool rows, const char* numbers_name, const std::vector<double>& numbers,
                    const OptionalTensor& tensor);

 private:
  Operand flat(const char* name, const Tensor& tensor);

  const char* op_;
  std::vector<Tensor> kept_;
};

}  // namespace ssp
