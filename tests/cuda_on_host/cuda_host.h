#pragma once

// Runs the source of CUDA kernels on the CPU, one thread after the other: for kernels whose threads
// do not communicate. The tests have the compiler include it before everything else.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#undef __global__
#undef __launch_bounds__
#define __global__
#define __launch_bounds__(...)

namespace cuda_host {

inline dim3 block_size;
inline uint3 block_index;
inline uint3 thread_index;

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, const Arguments&... arguments) {
  block_size = block;
  for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
    for (thread_index.x = 0; thread_index.x < block.x; ++thread_index.x) kernel(arguments...);
  }
}

}  // namespace cuda_host

#define blockDim cuda_host::block_size
#define blockIdx cuda_host::block_index
#define threadIdx cuda_host::thread_index
#define SSP_LAUNCH(kernel, grid, block, shared, stream, ...) \
  cuda_host::launch(kernel, grid, block, __VA_ARGS__)
