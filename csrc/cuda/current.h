#pragma once

// The GPU that an op runs on, as PyTorch and the CUDA runtime know it.

#include <cuda_runtime_api.h>

#include <memory>

#include "../layout.h"
#include "device.h"

namespace ssp {

// Makes the device of an op's first operand the current one; raises unless it is a CUDA tensor.
// Every other operand has to be there too: check_device of checks.h.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, const char* name, const Tensor& tensor);
  ~DeviceGuard();

  // Grid-wide barriers are left unused where SSP_FUSED_CUDA_SINGLE_LAUNCH is 0.
  Device device() const;
  // The current stream.
  cudaStream_t stream() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Raises where a launch went wrong.
void check_launch(const char* op, cudaError_t error);

}  // namespace ssp
