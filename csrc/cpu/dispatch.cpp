// Chooses the instruction set of the tile kernels: the widest that the processor has, or the one
// that SSP_FUSED_CPU_ISA names.

#include <cstdlib>
#include <string>

#include "errors.h"
#include "tiles.h"

namespace ssp {

#define SSP_DECLARE_TILES(isa)                   \
  namespace isa {                                \
  extern const TileKernels<float> float_tiles;   \
  extern const TileKernels<double> double_tiles; \
  }
SSP_DECLARE_TILES(baseline)
#if defined(SSP_X86_ISAS)
SSP_DECLARE_TILES(avx2)
SSP_DECLARE_TILES(avx512)
#endif
#undef SSP_DECLARE_TILES

namespace {

struct Isa {
  const char* name;
  bool supported;
  const TileKernels<float>* float_tiles;
  const TileKernels<double>* double_tiles;
};

const Isa& chosen_isa() {
  static const Isa chosen = [] {
#if defined(SSP_X86_ISAS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
#endif
    const Isa isas[] = {
#if defined(SSP_X86_ISAS)
        {"avx512", avx512, &avx512::float_tiles, &avx512::double_tiles},
        {"avx2", avx2, &avx2::float_tiles, &avx2::double_tiles},
#endif
        {"baseline", true, &baseline::float_tiles, &baseline::double_tiles},
    };
    const char* variable = std::getenv("SSP_FUSED_CPU_ISA");
    const std::string asked = variable == nullptr ? "" : variable;
    std::string usable;
    for (const Isa& isa : isas) {
      if (!isa.supported) continue;
      if (asked.empty() || asked == isa.name) return isa;
      usable += (usable.empty() ? "" : ", ") + std::string(isa.name);
    }
    SSP_CHECK(false, "SSP_FUSED_CPU_ISA must be unset or one that this processor has (", usable,
              "), but is '", asked, "'");
  }();
  return chosen;
}

}  // namespace

template <>
const TileKernels<float>& tiles<float>() {
  return *chosen_isa().float_tiles;
}

template <>
const TileKernels<double>& tiles<double>() {
  return *chosen_isa().double_tiles;
}

}  // namespace ssp

// For ctypes: the instruction set in use, or null where SSP_FUSED_CPU_ISA names an unusable one.
extern "C" __attribute__((visibility("default"))) const char* ssp_fused_cpu_isa() {
  try {
    return ssp::chosen_isa().name;
  } catch (...) {
    return nullptr;
  }
}
