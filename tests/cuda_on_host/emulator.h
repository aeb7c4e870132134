#pragma once

// The names of CUDA that the kernels use, for running their source on the CPU. Included before
// everything else by the build of the test module (build.py).
//
// Every thread of a block is a fiber, and runs until it waits at a barrier or a shuffle. Blocks run
// one after the other, or all at once in a cooperative launch. Memory is as strong as the CPU's, so
// that races show only where the order of the threads, which can be chosen, makes them.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace emulator {

// A kernel did what no kernel may; the message says which one, and where.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { kForward, kReverse, kShuffled };

struct Settings {
  int multiprocessors = 4;
  int blocks_per_multiprocessor = 2;
  int shared_bytes = 64 << 10;  // of a multiprocessor, all of which a block may ask for
  bool cooperative = true;
  Order order = Order::kForward;  // of blocks, and of a block's threads
  unsigned seed = 0;
};

struct Launch {
  std::string kernel;
  unsigned blocks;
  unsigned threads;
  size_t shared_bytes;
  bool cooperative;
};

using Site = std::source_location;

inline Settings settings;
inline std::vector<Launch> launches;  // since the tests last cleared it

void run(const Launch& launch, const std::function<void()>& thread);
int blocks_per_multiprocessor(unsigned threads, size_t shared_bytes);
void* shared_memory(Site where = Site::current());
void block_barrier(Site where);
void grid_barrier(Site where = Site::current());
// The value given by another lane.
uint64_t exchange(unsigned mask, uint64_t value, int from_lane, Site where);
int lane();
[[noreturn]] void fail(const std::string& what, Site where);

template <class... Parameters>
void launch(std::string_view name, bool cooperative, void (*kernel)(Parameters...), dim3 grid,
            dim3 block, size_t shared_bytes, cudaStream_t, const Parameters&... parameters) {
  if (grid.y * grid.z * block.y * block.z != 1) throw Error("only x is emulated");
  const std::string_view bare = name.substr(name.front() == '(', name.find('<'));
  run({std::string(bare.substr(0, bare.find_first_of("<)"))), grid.x, block.x, shared_bytes,
       cooperative},
      [&] { kernel(parameters...); });
}

}  // namespace emulator

inline dim3 gridDim;
inline dim3 blockDim;
inline uint3 blockIdx;
inline uint3 threadIdx;

using std::max;
using std::min;

inline void __syncthreads(emulator::Site where = emulator::Site::current()) {
  emulator::block_barrier(where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes,
                  emulator::Site where = emulator::Site::current()) {
  static_assert(sizeof(T) == 4);
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint64_t other = emulator::exchange(mask, bits, emulator::lane() ^ lanes, where);
  return std::bit_cast<T>(static_cast<uint32_t>(other));
}

template <class T>
T __ldg(const T* address, emulator::Site where = emulator::Site::current()) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    emulator::fail("a misaligned load of " + std::to_string(sizeof(T)) + " bytes", where);
  }
  return *address;
}

#define __launch_bounds__(...)
#define SSP_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulator::launch(#kernel, false, kernel, grid, block, shared, stream, __VA_ARGS__)
#define SSP_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, ...) \
  emulator::launch(#kernel, true, kernel, grid, block, shared, stream, __VA_ARGS__)
#define SSP_BLOCKS_PER_MULTIPROCESSOR(kernel, threads, shared) \
  emulator::blocks_per_multiprocessor(threads, shared)
#define SSP_GRID_SYNC() emulator::grid_barrier()
#define SSP_DYN_SHARED(T, name) T* name = static_cast<T*>(emulator::shared_memory())
