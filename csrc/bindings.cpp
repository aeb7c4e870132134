// The Python module ssp_fused._C: how the binaries were built, and the scalar mathematics that the
// CPU and CUDA kernels share, one element at a time, for tests to hold against the reference.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "build_config.h"
#include "math/activation.h"
#include "math/attack.h"
#include "math/moments.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cplusplus"] = static_cast<long>(__cplusplus);
#ifdef NDEBUG
  info["build_type"] = "release";
#else
  info["build_type"] = "debug";
#endif
  info["torch"] = SSP_BUILD_TORCH;
  info["isas"] = SSP_BUILD_ISAS;
  info["nvcc"] = SSP_BUILD_NVCC;
  info["cuda_archs"] = SSP_BUILD_CUDA_ARCHS;
  return info;
}

// Calls f with the activation as a constant, as the kernels do.
template <class F>
auto with_activation(int activation, const F& f) {
  switch (activation) {
    case ssp::kIdentity:
      return f(std::integral_constant<int, ssp::kIdentity>{});
    case ssp::kRelu:
      return f(std::integral_constant<int, ssp::kRelu>{});
    case ssp::kLeakyRelu:
      return f(std::integral_constant<int, ssp::kLeakyRelu>{});
    case ssp::kSilu:
      return f(std::integral_constant<int, ssp::kSilu>{});
    default:
      throw std::invalid_argument("activation must be 0 to 3, but is " +
                                  std::to_string(activation));
  }
}

// Functions of csrc/math in the arithmetic type A.
template <class A>
void bind_math(py::module_ m) {
  m.def(
      "activate",
      [](int activation, A y) {
        return with_activation(activation, [&](auto a) { return ssp::activate<a.value>(y); });
      },
      py::arg("activation"), py::arg("y"));
  m.def(
      "activation_backward",
      [](int activation, A dz, A y) {
        return with_activation(activation,
                               [&](auto a) { return ssp::activation_backward<a.value>(dz, y); });
      },
      py::arg("activation"), py::arg("dz"), py::arg("y"));
  m.def(
      "linf_step",
      [](A x_adv, A grad, A x, A step_size, A eps, A low, A high) {
        return ssp::linf_step<A>(x_adv, grad, x, step_size, eps, low, high);
      },
      py::arg("x_adv"), py::arg("grad"), py::arg("x"), py::arg("step_size"), py::arg("eps"),
      py::arg("low"), py::arg("high"));
}

using MomentsTuple = std::tuple<double, double, double>;

// Moments as (mean, m2, count).
MomentsTuple merge(const MomentsTuple& a, const MomentsTuple& b) {
  const auto moments = [](const MomentsTuple& t) {
    return ssp::Moments{std::get<0>(t), std::get<1>(t), std::get<2>(t)};
  };
  const ssp::Moments merged = ssp::merge(moments(a), moments(b));
  return {merged.mean, merged.m2, merged.count};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, and the kernels' scalar mathematics for tests.";
  m.def("build_info", &build_info);
  m.def("merge", &merge, py::arg("a"), py::arg("b"));
  bind_math<float>(m.def_submodule("math32", "In float."));
  bind_math<double>(m.def_submodule("math64", "In double."));
}
