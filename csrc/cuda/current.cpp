#include "current.h"

#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include "../checks.h"

namespace ssp {
namespace {

using torch::stable::accelerator::getCurrentDeviceIndex;

std::string device_name(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_launch("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, name, device));
  return value;
}

Device properties(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  const Device device{attribute(cudaDevAttrMultiProcessorCount, index),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                      attribute(cudaDevAttrCooperativeLaunch, index) != 0};
  return known[index] = device;
}

bool wants_single_launch() {
  const char* wish = std::getenv("SSP_FUSED_CUDA_SINGLE_LAUNCH");
  const std::string value = wish == nullptr ? "1" : wish;
  SSP_CHECK(value == "0" || value == "1", "SSP_FUSED_CUDA_SINGLE_LAUNCH must be 0 or 1, but is ",
            value);
  return value == "1";
}

}  // namespace

struct DeviceGuard::State {
  explicit State(int device) : index(device), guard(device) {}
  int index;
  torch::stable::accelerator::DeviceGuard guard;
};

DeviceGuard::DeviceGuard(const char* op, const char* name, const Tensor& tensor) {
  SSP_CHECK(tensor.is_cuda(), op, ": ", name, " must be on a CUDA device like the others");
  state_ = std::make_unique<State>(tensor.get_device_index());
}

DeviceGuard::~DeviceGuard() = default;

Device DeviceGuard::device() const {
  Device device = properties(state_->index);
  device.cooperative = device.cooperative && wants_single_launch();
  return device;
}

cudaStream_t DeviceGuard::stream() const {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(state_->index, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_device(const char* op, const char* name, const Tensor& tensor) {
  const int current = getCurrentDeviceIndex();
  SSP_CHECK(tensor.is_cuda() && tensor.get_device_index() == current, op, ": ", name,
            " must be on cuda:", current, " like the first operand, but is on ",
            device_name(tensor));
}

void check_launch(const char* op, cudaError_t error) {
  SSP_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace ssp
