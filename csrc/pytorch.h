#pragma once

// PyTorch's headers, without the streams that their errors format numbers in: where the compiler
// links parts of libstdc++ into a library, as some do, that crashes. No other file includes them.

#define STRIP_ERROR_MESSAGES  // STD_TORCH_CHECK throws its condition

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

#undef STABLE_TORCH_ERROR_CODE_CHECK
#undef TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)                                           \
  if ((call) != TORCH_SUCCESS) {                                               \
    throw std::runtime_error(#call " API call failed at " __FILE__ ", line " + \
                             std::to_string(__LINE__));                        \
  }

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
