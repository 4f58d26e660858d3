#pragma once

#include <immintrin.h>

// AVX-512 F, BW, VL, DQ and VNNI: 32 registers of 16 lanes.
namespace quantattn::cpu::avx512 {

inline constexpr int kLanes = 16;

}  // namespace quantattn::cpu::avx512
