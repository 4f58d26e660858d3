#pragma once

#include <arm_neon.h>

// Advanced SIMD of every AArch64 processor: 32 registers of 4 lanes.
namespace quantattn::cpu::neon {

inline constexpr int kLanes = 4;

}  // namespace quantattn::cpu::neon
