#pragma once

// Kernels reach the CUDA runtime through these names alone, so that a host build can run their
// source without a GPU by defining them before this header. All shared memory is dynamic.
#ifndef SSP_LAUNCH
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstddef>

namespace ssp {

constexpr size_t kSharedWithoutAsking = 48 << 10;

template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
  if (bytes <= kSharedWithoutAsking) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
}

template <class... Parameters>
int blocks_per_multiprocessor(void (*kernel)(Parameters...), int threads, size_t shared) {
  allow_shared(kernel, shared);
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared);
  return blocks;
}

// Errors of the calls here stay in cudaGetLastError, which every launch_* function returns.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            cudaStream_t stream, bool cooperative, const Parameters&... parameters) {
  allow_shared(kernel, shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, parameters...);
}

}  // namespace ssp

#define SSP_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ssp::launch(kernel, grid, block, shared, stream, false, __VA_ARGS__)
// All blocks run at the same time and may meet at SSP_GRID_SYNC.
#define SSP_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, ...) \
  ssp::launch(kernel, grid, block, shared, stream, true, __VA_ARGS__)
#define SSP_BLOCKS_PER_MULTIPROCESSOR(kernel, threads, shared) \
  ssp::blocks_per_multiprocessor(kernel, threads, shared)
#define SSP_GRID_SYNC() cooperative_groups::this_grid().sync()
#define SSP_DYN_SHARED(T, name)                                 \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  T* name = reinterpret_cast<T*>(name##_bytes)
#endif

#define SSP_DEVICE __device__ __forceinline__
