#pragma once

#include <arm_neon.h>

#include <cstdint>

// Advanced SIMD of every AArch64 processor: 32 registers of 4 lanes.
namespace quantattn::cpu::neon {

inline constexpr int kLanes = 4;

struct Native {
  using Vector = int32x4_t;
#define QATTN_NATIVE static inline __attribute__((always_inline))

  using Halves = uint16x4_t;
  QATTN_NATIVE float32x4_t half_to_float(Halves halves) { return vcvt_f32_f16(vreinterpret_f16_u16(halves)); }
  QATTN_NATIVE void float_to_half(float32x4_t x, uint16_t* halves) { vst1_u16(halves, vreinterpret_u16_f16(vcvt_f16_f32(x))); }

#undef QATTN_NATIVE
};

}  // namespace quantattn::cpu::neon
