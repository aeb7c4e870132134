#pragma once

// Units that the threads of a block keep in shared memory between two passes, where it has room.

#include "device.h"
#include "walk.cuh"

namespace ssp {

// The units' size is known at run time: a word holds an element, or two of half the size.
struct Shelf {
  static SSP_HD int words(Storage storage) { return storage == Storage::kFloat ? 8 : 4; }

  // Bytes that `words` of each of a thread's units take, or 0 where they do not fit beside `base`.
  static size_t bytes(int units, int words, int threads, size_t base, const Device& device) {
    const size_t wanted = sizeof(uint32_t) * units * words * threads;
    return base + wanted <= static_cast<size_t>(device.shared_bytes) ? wanted : 0;
  }

  SSP_DEVICE explicit Shelf(void* shared) : own(static_cast<uint4*>(shared) + threadIdx.x) {}

  template <Access kAccess>
  SSP_DEVICE void put(int vector, Storage storage, const RawUnit<kAccess>& raw) const {
    store_words(own + vector * blockDim.x, raw.words);
    if constexpr (kAccess != Access::kNarrow) {
      if (storage == Storage::kFloat) store_words(own + (vector + 1) * blockDim.x, raw.words + 4);
    }
  }
  SSP_DEVICE RawUnit<Access::kWide> get(int vector, Storage storage) const {
    RawUnit<Access::kWide> raw;
    set_words(own[vector * blockDim.x], raw.words);
    if (storage == Storage::kFloat) set_words(own[(vector + 1) * blockDim.x], raw.words + 4);
    return raw;
  }

 private:
  uint4* own;
};

}  // namespace ssp
