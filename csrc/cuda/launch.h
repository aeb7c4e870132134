#pragma once

// Kernels are launched through SSP_LAUNCH alone, so that a host build can run their source without
// a GPU by defining it before this header.
#ifndef SSP_LAUNCH
#include <cuda_runtime.h>
#define SSP_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif
