#pragma once

#include "block_sum.cuh"
#include "stage.cuh"
#include "stage_dots.h"

namespace ssp {

constexpr int kDotsThreads = 256;
constexpr int kDotsBlocks = 2;  // a multiprocessor

inline int stage_dots_blocks_on(int64_t n, const Device& device) {
  const int64_t filled = (n + kUnit * kDotsThreads - 1) / (kUnit * kDotsThreads);
  return static_cast<int>(std::min<int64_t>(filled, kDotsBlocks * device.multiprocessors));
}

// A thread's sums are in double: they cancel, and there are few of them.
template <Access kAccess>
__global__ void __launch_bounds__(kDotsThreads, kDotsBlocks)
    stage_dots_kernel(const StageDotsParams params) {
  SSP_DYN_SHARED(double, shared);
  double sums[kMaxTerms] = {};
  const int64_t step = int64_t{kUnit} * kDotsThreads * params.blocks;
  const int64_t begin = (int64_t{blockIdx.x} * kDotsThreads + threadIdx.x) * kUnit;
  for (int64_t offset = begin; offset < params.n; offset += step) {
    const int length = static_cast<int>(min(int64_t{kUnit}, params.n - offset));
    const RawUnit<kAccess> raw_g = load_unit<kAccess>(params.g, offset, length);
    RawUnit<kAccess> raw[kMaxTerms];
#pragma unroll
    for (int k = 0; k < kMaxTerms; ++k) {
      if (k < params.count) raw[k] = load_unit<kAccess>(params.terms[k], offset, length);
    }
    float g[kUnit];
    unpack(raw_g, params.g.storage, g);
#pragma unroll
    for (int k = 0; k < kMaxTerms; ++k) {
      if (k >= params.count) continue;
      float term[kUnit];
      unpack(raw[k], params.terms[k].storage, term);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) sums[k] += static_cast<double>(g[e]) * term[e];
    }
  }
#pragma unroll
  for (int k = 0; k < kMaxTerms; ++k) {
    if (k < params.count) shared[k * kDotsThreads + threadIdx.x] = sums[k];
  }
  __syncthreads();
  const SumScratch scratch(shared + kMaxTerms * kDotsThreads, false, kMaxTerms);
  sum_columns<1>(kDotsThreads, params.count, scratch, [&](int thread, int k, double* totals) {
    totals[0] += shared[k * kDotsThreads + thread];
  });
  for (int k = threadIdx.x; k < params.count; k += kDotsThreads) {
    params.partials[blockIdx.x * params.count + k] = static_cast<float>(scratch.totals[k]);
  }
}

inline void run_stage_dots(const StageDotsParams& params, cudaStream_t stream) {
  uintptr_t bits = address(params.g.data);
  for (int k = 0; k < params.count; ++k) bits |= address(params.terms[k].data);
  const size_t shared =
      sizeof(double) * kMaxTerms * kDotsThreads + SumScratch::bytes(false, kDotsThreads, kMaxTerms);
  if (bits % 16 == 0 && params.n % kUnit == 0) {
    SSP_LAUNCH(stage_dots_kernel<Access::kWide>, dim3(params.blocks), dim3(kDotsThreads), shared,
               stream, params);
  } else {
    SSP_LAUNCH(stage_dots_kernel<Access::kAny>, dim3(params.blocks), dim3(kDotsThreads), shared,
               stream, params);
  }
}

}  // namespace ssp
