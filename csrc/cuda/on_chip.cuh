#pragma once

// Units that a thread keeps between the passes of one launch: the first of them in registers, the
// others on a shelf in shared memory.

#include "device.h"
#include "on_chip.h"
#include "walk.cuh"

namespace ssp {

// kTensors tensors' units, of which a thread keeps kRegisters in registers.
template <int kTensors, Access kAccess, int kRegisters>
struct OnChip {
  static constexpr int kWords = RawUnit<kAccess>::kWords;
  struct Kept {
    RawUnit<kAccess> tensor[kTensors];
  };
  static constexpr int kVectors = kTensors * kWords / 4;
  static constexpr int kFirstOnShelf = kRegisters + 1;  // units of a thread that needs a shelf

  // Shared memory for blocks with `units` units of a thread.
  static size_t shelf_bytes(int threads, int units) {
    return units <= kRegisters ? 0 : sizeof(uint4) * kVectors * threads * (units - kRegisters);
  }

  SSP_DEVICE explicit OnChip(void* shared) : shelf(static_cast<uint4*>(shared) + threadIdx.x) {}

  // Loads the thread's units, kMost or as many as registers hold at once, and keeps what
  // f(raw, place, kept) puts into kept.
  template <int kMost, bool kRows, class Load, class F>
  SSP_DEVICE void fill(const Walk<kRows>& walk, const Load& load, const F& f) {
    constexpr int kBatch = kMost < kRegisters ? kMost : kRegisters;
    static_assert(kRegisters % kBatch == 0, "no batch may be partly in registers");
#pragma unroll
    for (int k = 0; k < kRegisters; k += kBatch) {
      batch<kBatch>(walk, k, load, [&](int i, const Place& place, const auto& raw) {
        f(raw, place, registers[k + i]);
      });
    }
    for (int k = kRegisters; walk.begin + k * walk.g.active < walk.end; k += kBatch) {
      batch<kBatch>(walk, k, load, [&](int i, const Place& place, const auto& raw) {
        Kept kept;
        f(raw, place, kept);
        put(k + i, kept);
      });
    }
  }

  // Calls f(kept, place, raw) for every unit kept, `raw` being what load(place) has loaded: as many
  // units at once as registers hold.
  template <bool kRows, class Load, class F>
  SSP_DEVICE void for_each(const Walk<kRows>& walk, const Load& load, const F& f) const {
    batch<kRegisters>(walk, 0, load, [&](int i, const Place& place, const auto& raw) {
      f(registers[i], place, raw);
    });
    for (int k = kRegisters; walk.begin + k * walk.g.active < walk.end; k += kRegisters) {
      batch<kRegisters>(walk, k, load, [&](int i, const Place& place, const auto& raw) {
        f(get(k + i), place, raw);
      });
    }
  }

  // Calls f(kept, unit) for every unit kept.
  template <bool kRows, class F>
  SSP_DEVICE void for_each(const Walk<kRows>& walk, const F& f) const {
#pragma unroll
    for (int k = 0; k < kRegisters; ++k) {
      const uint32_t unit = walk.begin + k * walk.g.active;
      if (unit < walk.end) f(registers[k], unit);
    }
    for (int k = kRegisters; walk.begin + k * walk.g.active < walk.end; ++k) {
      f(get(k), walk.begin + k * walk.g.active);
    }
  }

 private:
  // Loads kCount of the thread's units, from the first on, and then calls f(i, place, raw) for
  // each.
  template <int kCount, bool kRows, class Load, class F>
  SSP_DEVICE static void batch(const Walk<kRows>& walk, int first, const Load& load, const F& f) {
    decltype(load(Place{})) raw[kCount];
    Place places[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t unit = walk.begin + (first + i) * walk.g.active;
      if (unit >= walk.end) continue;
      places[i] = place_of<kAccess>(walk, unit);
      raw[i] = load(places[i]);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (walk.begin + (first + i) * walk.g.active < walk.end) f(i, places[i], raw[i]);
    }
  }
  SSP_DEVICE uint4* place(int k, int vector) const {
    return shelf + ((k - kRegisters) * kVectors + vector) * blockDim.x;
  }
  SSP_DEVICE void put(int k, const Kept& kept) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      store_words(place(k, v), kept.tensor[v / (kWords / 4)].words + v % (kWords / 4) * 4);
    }
  }
  SSP_DEVICE Kept get(int k) const {
    Kept kept;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      set_words(*place(k, v), kept.tensor[v / (kWords / 4)].words + v % (kWords / 4) * 4);
    }
    return kept;
  }

  Kept registers[kRegisters];
  uint4* shelf;
};

// For a kernel with shared memory `base_bytes(geometry)` beside the shelf. `blocks_on(shared)`: how
// many of its blocks a multiprocessor holds at once.
template <class Chip, class BaseBytes, class Blocks>
OnChipPlan plan_on_chip(const Extent& extent, int max_width, int threads, const Device& device,
                        const BaseBytes& base_bytes, const Blocks& blocks_on) {
  OnChipPlan plan;
  if (!device.cooperative) return plan;
  plan.geometry = channel_geometry(extent, max_width, threads, device.multiprocessors);
  const Geometry& g = plan.geometry;
  const int64_t units = (int64_t{g.part_units()} + g.active - 1) / g.active;
  const size_t available = static_cast<size_t>(device.shared_bytes);
  plan.shared = base_bytes(g);
  if (plan.shared > available) return plan;
  const size_t most = (available - plan.shared) / Chip::shelf_bytes(threads, Chip::kFirstOnShelf);
  if (units > static_cast<int64_t>(most) + Chip::kFirstOnShelf - 1) return plan;
  plan.shared += Chip::shelf_bytes(threads, static_cast<int>(units));
  const int blocks = blocks_on(plan.shared);
  plan.fits = blocks > 0 &&
              (g.parts == 1 || static_cast<int>(g.blocks()) <= blocks * device.multiprocessors);
  return plan;
}

}  // namespace ssp
