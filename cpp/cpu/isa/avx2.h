#pragma once

#include <immintrin.h>

// AVX2 with FMA and F16C: 16 registers of 8 lanes.
namespace quantattn::cpu::avx2 {

inline constexpr int kLanes = 8;

}  // namespace quantattn::cpu::avx2
