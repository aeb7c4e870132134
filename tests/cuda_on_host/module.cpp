// The Python module: the emulated GPU's properties, its launches, and the ops of the CUDA library,
// registered for CPU tensors in any namespace that has their schemas.

#include <pybind11/pybind11.h>

#include <list>
#include <string>
#include <utility>

#include "checks.h"
#include "cuda/current.h"
#include "register_ops.h"

namespace py = pybind11;

using torch::stable::detail::StableLibrary;

cudaError_t cudaGetLastError() { return cudaSuccess; }

// In place of current.cpp.
namespace ssp {

struct DeviceGuard::State {};

DeviceGuard::DeviceGuard(const char* op, const char* name, const Tensor& tensor) {
  check_device(op, name, tensor);
}

DeviceGuard::~DeviceGuard() = default;

Device DeviceGuard::device() const {
  return {emulator::settings.multiprocessors, emulator::settings.shared_bytes,
          emulator::settings.cooperative};
}

cudaStream_t DeviceGuard::stream() const { return nullptr; }

void check_device(const char* op, const char* name, const Tensor& tensor) {
  SSP_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
}

void check_launch(const char*, cudaError_t) {}

}  // namespace ssp

namespace {

void add_to(const std::string& name) {
  static std::list<StableLibrary> libraries;
  static std::list<std::string> names;
  const char* kept = names.emplace_back(name).c_str();
  libraries.emplace_back(StableLibrary::Kind::IMPL, kept, "CPU", __FILE__, __LINE__);
  ssp::register_ops(libraries.back());
}

emulator::Order order(const std::string& name) {
  if (name == "forward") return emulator::Order::kForward;
  if (name == "reverse") return emulator::Order::kReverse;
  if (name == "shuffled") return emulator::Order::kShuffled;
  throw py::value_error("order must be forward, reverse or shuffled, but is " + name);
}

void configure(int multiprocessors, int blocks_per_multiprocessor, int shared_bytes,
               bool cooperative, const std::string& order_name, unsigned seed) {
  emulator::settings = {multiprocessors, blocks_per_multiprocessor, shared_bytes,
                        cooperative,     order(order_name),         seed};
}

py::list take_launches() {
  py::list taken;
  for (const emulator::Launch& launch : std::exchange(emulator::launches, {})) {
    taken.append(py::make_tuple(launch.kernel, launch.blocks, launch.threads, launch.shared_bytes,
                                launch.cooperative));
  }
  return taken;
}

}  // namespace

PYBIND11_MODULE(ssp_fused_emulated, m) {
  const emulator::Settings usual;
  m.def("add_to", &add_to, py::arg("namespace"), "Register the ops for CPU tensors.");
  m.def("configure", &configure, py::kw_only(), py::arg("multiprocessors") = usual.multiprocessors,
        py::arg("blocks_per_multiprocessor") = usual.blocks_per_multiprocessor,
        py::arg("shared_bytes") = usual.shared_bytes, py::arg("cooperative") = usual.cooperative,
        py::arg("order") = "forward", py::arg("seed") = usual.seed,
        "The GPU of the following calls, and the order of its blocks and threads.");
  m.def("take_launches", &take_launches,
        "Launches since the last call: kernel, blocks, threads, shared bytes, cooperative.");
}
