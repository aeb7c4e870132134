#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../math/attack.h"
#include "launch.h"
#include "linf_step.h"

namespace ssp {

constexpr int kLinfStepThreads = 256;
constexpr int kLinfStepVectorBytes = 16;

template <class T, int kSize>
struct alignas(kSize * sizeof(T)) LinfStepVector {
  T element[kSize];
};

// reference.linf_step, kSize elements a thread in one access; the last thread takes what is left.
template <class T, int kSize>
__global__ void __launch_bounds__(kLinfStepThreads) linf_step_kernel(const LinfStepParams params) {
  using arithmetic_t = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using vector_t = LinfStepVector<T, kSize>;
  const auto* x_adv = static_cast<const T*>(params.x_adv);
  const auto* grad = static_cast<const T*>(params.grad);
  const auto* x = static_cast<const T*>(params.x);
  auto* out = static_cast<T*>(params.out);
  const auto step = [&params](T element, T gradient, T centre) {
    return static_cast<T>(linf_step<arithmetic_t>(
        static_cast<arithmetic_t>(element), static_cast<arithmetic_t>(gradient),
        static_cast<arithmetic_t>(centre), static_cast<arithmetic_t>(params.step_size),
        static_cast<arithmetic_t>(params.eps), static_cast<arithmetic_t>(params.low),
        static_cast<arithmetic_t>(params.high)));
  };

  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t begin = index * kSize;
  if (begin + kSize <= params.n) {
    const vector_t v_adv = reinterpret_cast<const vector_t*>(x_adv)[index];
    const vector_t v_grad = reinterpret_cast<const vector_t*>(grad)[index];
    const vector_t v_x = reinterpret_cast<const vector_t*>(x)[index];
    vector_t v_out;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      v_out.element[k] = step(v_adv.element[k], v_grad.element[k], v_x.element[k]);
    }
    reinterpret_cast<vector_t*>(out)[index] = v_out;
  } else {
    for (int64_t i = begin; i < params.n; ++i) {
      out[i] = step(x_adv[i], grad[i], x[i]);
    }
  }
}

template <class T, int kSize>
void run_linf_step(const LinfStepParams& params, cudaStream_t stream) {
  const int64_t threads = (params.n + kSize - 1) / kSize;
  const auto blocks = static_cast<unsigned>((threads + kLinfStepThreads - 1) / kLinfStepThreads);
  SSP_LAUNCH((linf_step_kernel<T, kSize>), dim3(blocks), dim3(kLinfStepThreads), 0, stream, params);
}

// Vector accesses need all four pointers aligned: a slice of a larger buffer may start anywhere.
template <class T>
void run_linf_step(const LinfStepParams& params, cudaStream_t stream) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const auto low_bits =
      address(params.x_adv) | address(params.grad) | address(params.x) | address(params.out);
  if (low_bits % kLinfStepVectorBytes == 0) {
    run_linf_step<T, kLinfStepVectorBytes / static_cast<int>(sizeof(T))>(params, stream);
  } else {
    run_linf_step<T, 1>(params, stream);
  }
}

}  // namespace ssp
