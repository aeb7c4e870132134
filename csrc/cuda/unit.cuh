#pragma once

// Units: runs of up to eight elements inside one plane or row. A thread reads and writes a unit at
// a time, and a mask has one byte for each.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../math/activation.h"
#include "launch.h"
#include "operand.h"

namespace ssp {

constexpr int kUnit = 8;

// How a kernel reads and writes units. In kWide and kNarrow all of them are whole and lie on 16
// byte boundaries; in kNarrow all elements have 16 bits, so that a unit takes half the registers.
enum class Access { kAny, kWide, kNarrow };

// A unit as it is stored; the second half of eight words is used by float alone.
template <Access kAccess>
struct RawUnit {
  static constexpr int kWords = kAccess == Access::kNarrow ? kUnit / 2 : kUnit;
  uint32_t words[kWords];
};

// Whether the elements of an operand have 32 bits, which kernels that access kNarrow know.
template <Access kAccess>
SSP_DEVICE bool is_wide(Storage storage) {
  return kAccess != Access::kNarrow && storage == Storage::kFloat;
}

SSP_DEVICE void set_words(const uint4& four, uint32_t* words) {
  words[0] = four.x;
  words[1] = four.y;
  words[2] = four.z;
  words[3] = four.w;
}

SSP_DEVICE void load_words(const void* address, uint32_t* words) {
  set_words(__ldg(static_cast<const uint4*>(address)), words);
}

SSP_DEVICE void store_words(void* address, const uint32_t* words) {
  *static_cast<uint4*>(address) = make_uint4(words[0], words[1], words[2], words[3]);
}

template <Access kAccess>
SSP_DEVICE RawUnit<kAccess> load_unit(const Operand& from, int64_t offset, int length) {
  RawUnit<kAccess> raw;
  const bool wide = is_wide<kAccess>(from.storage);
  const char* address = static_cast<const char*>(from.data) + (offset << (wide ? 2 : 1));
  if constexpr (kAccess == Access::kNarrow) {
    load_words(address, raw.words);
  } else if constexpr (kAccess == Access::kWide) {
    load_words(address, raw.words);
    if (wide) load_words(address + 16, raw.words + 4);
  } else {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) raw.words[e] = 0;
    if (wide) {
      const auto* elements = reinterpret_cast<const uint32_t*>(address);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        if (e < length) raw.words[e] = elements[e];
      }
    } else {
      const auto* elements = reinterpret_cast<const uint16_t*>(address);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        if (e < length) raw.words[e / 2] |= static_cast<uint32_t>(elements[e]) << (e % 2 * 16);
      }
    }
  }
  return raw;
}

template <Access kAccess>
SSP_DEVICE void store_unit(const Operand& to, int64_t offset, int length,
                           const RawUnit<kAccess>& raw) {
  const bool wide = is_wide<kAccess>(to.storage);
  char* address = static_cast<char*>(to.data) + (offset << (wide ? 2 : 1));
  if constexpr (kAccess == Access::kNarrow) {
    store_words(address, raw.words);
  } else if constexpr (kAccess == Access::kWide) {
    store_words(address, raw.words);
    if (wide) store_words(address + 16, raw.words + 4);
  } else if (wide) {
    auto* elements = reinterpret_cast<uint32_t*>(address);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      if (e < length) elements[e] = raw.words[e];
    }
  } else {
    auto* elements = reinterpret_cast<uint16_t*>(address);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      if (e < length) elements[e] = static_cast<uint16_t>(raw.words[e / 2] >> (e % 2 * 16));
    }
  }
}

SSP_DEVICE float half_value(uint32_t bits) {
  return __half2float(__half(__half_raw{static_cast<unsigned short>(bits)}));
}

template <Access kAccess>
SSP_DEVICE void unpack(const RawUnit<kAccess>& raw, Storage storage, float (&values)[kUnit]) {
  if (is_wide<kAccess>(storage)) {
    if constexpr (kAccess != Access::kNarrow) {
#pragma unroll
      for (int e = 0; e < kUnit; ++e) values[e] = bit_cast<float>(raw.words[e]);
    }
  } else if (storage == Storage::kHalf) {
#pragma unroll
    for (int e = 0; e < kUnit; e += 2) {
      values[e] = half_value(raw.words[e / 2] & 0xffffu);
      values[e + 1] = half_value(raw.words[e / 2] >> 16);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kUnit; e += 2) {
      values[e] = bit_cast<float>(raw.words[e / 2] << 16);
      values[e + 1] = bit_cast<float>(raw.words[e / 2] & 0xffff0000u);
    }
  }
}

// Rounded to nearest even.
template <Access kAccess>
SSP_DEVICE RawUnit<kAccess> pack(const float (&values)[kUnit], Storage storage) {
  RawUnit<kAccess> raw;
  if (is_wide<kAccess>(storage)) {
    if constexpr (kAccess != Access::kNarrow) {
#pragma unroll
      for (int e = 0; e < kUnit; ++e) raw.words[e] = bit_cast<uint32_t>(values[e]);
    }
  } else if (storage == Storage::kHalf) {
#pragma unroll
    for (int e = 0; e < kUnit; e += 2) {
      raw.words[e / 2] = bit_cast<uint32_t>(__floats2half2_rn(values[e], values[e + 1]));
    }
  } else {
#pragma unroll
    for (int e = 0; e < kUnit; e += 2) {
      raw.words[e / 2] = bit_cast<uint32_t>(__floats2bfloat162_rn(values[e], values[e + 1]));
    }
  }
  return raw;
}

// One value of a small vector.
SSP_DEVICE float value_at(const Operand& vector, int64_t index) {
  switch (vector.storage) {
    case Storage::kFloat:
      return static_cast<const float*>(vector.data)[index];
    case Storage::kDouble:
      return static_cast<float>(static_cast<const double*>(vector.data)[index]);
    case Storage::kHalf:
      return half_value(static_cast<const uint16_t*>(vector.data)[index]);
    default:
      return bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(vector.data)[index])
                             << 16);
  }
}

SSP_DEVICE float value_or(const Operand& vector, int64_t index, float missing) {
  return vector.data == nullptr ? missing : value_at(vector, index);
}

// Calls f with the activation as a constant.
template <class F>
SSP_DEVICE void with_activation(int activation, const F& f) {
  switch (activation) {
    case kRelu:
      return f.template operator()<kRelu>();
    case kLeakyRelu:
      return f.template operator()<kLeakyRelu>();
    case kSilu:
      return f.template operator()<kSilu>();
    default:
      return f.template operator()<kIdentity>();
  }
}

}  // namespace ssp
