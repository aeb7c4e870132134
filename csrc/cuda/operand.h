#pragma once

#include <cstdint>

#include "../math/combine.h"
#include "../math/macros.h"

namespace ssp {

// kDouble: small vectors only; activations are never stored in it.
enum class Storage : int { kFloat, kHalf, kBfloat16, kDouble };

SSP_HD int64_t bytes_of(Storage storage) {
  return storage == Storage::kFloat ? 4 : storage == Storage::kDouble ? 8 : 2;
}

// A dense tensor, or none: data is null.
struct Operand {
  void* data = nullptr;
  Storage storage = Storage::kFloat;
};

// Terms with their coefficients: numbers, replaced by those of `coefficient_tensor` where given.
struct TermsParams {
  Operand terms[kMaxTerms];
  int count = 0;
  float coefficients[kMaxTerms] = {};
  Operand coefficient_tensor;
};

// u = sum_k c_k t_k + channel_bias; u.data is null where u is not wanted, its storage is not.
struct StageParams {
  TermsParams sum;
  Operand channel_bias;
  Operand u;
};

}  // namespace ssp
