#pragma once

#include "../math/attack.h"
#include "block_sum.cuh"
#include "l2_step.h"
#include "stage.cuh"

namespace ssp {

constexpr int kL2StepThreads = 512;

// The square root of the sum of a value of every thread, the same to all of them.
SSP_DEVICE double block_norm(double square, double* shared) {
  shared[threadIdx.x] = square;
  __syncthreads();
  for (int half = kL2StepThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const double total = shared[0];
  __syncthreads();
  return sqrt(total);
}

// A block for each sample, which passes over it three times: the second and third time it lies in
// cache. Squares are summed in double, where none of a float overflows.
template <Access kAccess>
__global__ void __launch_bounds__(kL2StepThreads) l2_step_kernel(const L2StepParams params) {
  SSP_DYN_SHARED(double, shared);
  const int64_t first = blockIdx.x * params.n;
  const auto for_each_unit = [&](const auto& f) {
    for (int64_t i = int64_t{threadIdx.x} * kUnit; i < params.n; i += kL2StepThreads * kUnit) {
      f(first + i, static_cast<int>(min(int64_t{kUnit}, params.n - i)));
    }
  };
  const auto read = [&](const Operand& operand, int64_t offset, int length,
                        float (&values)[kUnit]) {
    unpack(load_unit<kAccess>(operand, offset, length), operand.storage, values);
  };

  double square = 0;
  for_each_unit([&](int64_t offset, int length) {
    float grad[kUnit];
    read(params.grad, offset, length, grad);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) square += static_cast<double>(grad[e]) * grad[e];
  });
  const float length_of_grad = static_cast<float>(block_norm(square, shared));

  const auto displacement = [&](int64_t offset, int length, float (&x)[kUnit],
                                float (&moved)[kUnit]) {
    float x_adv[kUnit];
    float grad[kUnit];
    read(params.x_adv, offset, length, x_adv);
    read(params.grad, offset, length, grad);
    read(params.x, offset, length, x);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      moved[e] = l2_displacement(x_adv[e], grad[e], x[e], static_cast<float>(params.step_size),
                                 length_of_grad);
    }
  };
  square = 0;
  for_each_unit([&](int64_t offset, int length) {
    float x[kUnit];
    float moved[kUnit];
    displacement(offset, length, x, moved);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) square += static_cast<double>(moved[e]) * moved[e];
  });
  const double distance = block_norm(square, shared);
  const float shrink = distance > params.eps ? static_cast<float>(params.eps / distance) : 1.0f;
  for_each_unit([&](int64_t offset, int length) {
    float x[kUnit];
    float moved[kUnit];
    displacement(offset, length, x, moved);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      moved[e] = l2_projection(x[e], moved[e], shrink, static_cast<float>(params.low),
                               static_cast<float>(params.high));
    }
    store_unit(params.out, offset, length, pack<kAccess>(moved, params.out.storage));
  });
}

inline void run_l2_step(const L2StepParams& params, cudaStream_t stream) {
  const uintptr_t bits = address(params.x_adv.data) | address(params.grad.data) |
                         address(params.x.data) | address(params.out.data);
  const dim3 grid(static_cast<unsigned>(params.samples));
  const size_t shared = sizeof(double) * kL2StepThreads;
  if (bits % 16 == 0 && params.n % kUnit == 0) {
    SSP_LAUNCH(l2_step_kernel<Access::kWide>, grid, dim3(kL2StepThreads), shared, stream, params);
  } else {
    SSP_LAUNCH(l2_step_kernel<Access::kAny>, grid, dim3(kL2StepThreads), shared, stream, params);
  }
}

}  // namespace ssp
