#pragma once

// Scalar functions shared by the CPU kernels, the CUDA kernels and the test bindings.
//
// Always inlined on the host too: the CPU tiles are compiled once per instruction set, and an
// out-of-line copy of one function in several objects would let the linker keep the AVX-512 one
// for every processor.
#if defined(__CUDACC__)
#define SSP_HD __host__ __device__ __forceinline__
#else
#define SSP_HD inline __attribute__((always_inline))
#endif
