#pragma once

#include <cuda_fp16.h>

#include "formats/bf16.h"
#include "formats/fp16.h"
#include "formats/fp8_e4m3.h"
#include "formats/fp8_e5m2.h"
#include "formats/int8.h"

// Cached codes to the 16-bit operands of the tensor cores, in registers. A format that the GPU can read specialises `Widen`:
//   kBytes          bytes of one code
//   kIsBf16         the operand is bfloat16 (else float16)
//   kNonFiniteBits  a code with all of these bits is infinite or NaN; 0: no code is
//   kFactor         value = operand * kFactor, a power of two that is folded into the scale
//   widen           8-bit codes only: the four bytes of a word to two operand pairs, (0, 1) and (2, 3), or, interleaved,
//                   (0, 2) and (1, 3), the order in which a transposed matrix load delivers two tokens
namespace quantattn::cuda {

enum class ByteOrder { kAdjacent, kInterleaved };

template <class Format>
struct Widen;

template <>
struct Widen<formats::Fp16> {
  static constexpr int kBytes = 2;
  static constexpr bool kIsBf16 = false;
  static constexpr uint32_t kNonFiniteBits = 0x7C00;
  static constexpr float kFactor = 1.f;
};

template <>
struct Widen<formats::Bf16> {
  static constexpr int kBytes = 2;
  static constexpr bool kIsBf16 = true;
  static constexpr uint32_t kNonFiniteBits = 0x7F80;
  static constexpr float kFactor = 1.f;
};

template <>
struct Widen<formats::Int8> {
  static constexpr int kBytes = 1;
  static constexpr bool kIsBf16 = false;
  static constexpr uint32_t kNonFiniteBits = 0;
  static constexpr float kFactor = 1.f;

  // code + 128 under the exponent of 1024 is the float16 1152 + code.
  template <ByteOrder kOrder>
  __device__ __forceinline__ static void widen(uint32_t word, uint32_t& first, uint32_t& second) {
    constexpr bool kAdjacent = kOrder == ByteOrder::kAdjacent;
    const uint32_t biased = word ^ 0x80808080u;
    first = subtract_1152(__byte_perm(biased, 0x64646464u, kAdjacent ? 0x4140 : 0x4240));
    second = subtract_1152(__byte_perm(biased, 0x64646464u, kAdjacent ? 0x4342 : 0x4341));
  }

 private:
  __device__ __forceinline__ static uint32_t subtract_1152(uint32_t pair) {
    uint32_t difference;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(pair), "r"(0x64806480u));
    return difference;
  }
};

// E5M2 is the upper byte of a float16.
template <>
struct Widen<formats::Fp8E5M2> {
  static constexpr int kBytes = 1;
  static constexpr bool kIsBf16 = false;
  static constexpr uint32_t kNonFiniteBits = 0x7C;
  static constexpr float kFactor = 1.f;

  template <ByteOrder kOrder>
  __device__ __forceinline__ static void widen(uint32_t word, uint32_t& first, uint32_t& second) {
    constexpr bool kAdjacent = kOrder == ByteOrder::kAdjacent;
    first = __byte_perm(word, 0, kAdjacent ? 0x1404 : 0x2404);
    second = __byte_perm(word, 0, kAdjacent ? 0x3424 : 0x3414);
  }
};

template <>
struct Widen<formats::Fp8E4M3> {
  static constexpr int kBytes = 1;
  static constexpr bool kIsBf16 = false;
  static constexpr uint32_t kNonFiniteBits = 0x7F;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  // Exponent and mantissa shifted into place leave E4M3's bias of 7 under float16's bias of 15.
  static constexpr float kFactor = 256.f;

  template <ByteOrder kOrder>
  __device__ __forceinline__ static void widen(uint32_t word, uint32_t& first, uint32_t& second) {
    Widen<formats::Fp8E5M2>::widen<kOrder>(word, first, second);
    first = shift_exponent(first);
    second = shift_exponent(second);
    // A byte of 0x7F or 0xFF is NaN; adding one carries into its sign.
    if (((word & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u) [[unlikely]] {
      first = restore_nan(first);
      second = restore_nan(second);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t shift_exponent(uint32_t pair) {
    return (pair >> 1 & 0x3F803F80u) | (pair & 0x80008000u);
  }
  __device__ __forceinline__ static uint32_t restore_nan(uint32_t pair) {
    const uint32_t low = (pair & 0x3F80u) == 0x3F80u ? 0x7FFFu : 0, high = (pair >> 16 & 0x3F80u) == 0x3F80u ? 0x7FFFu : 0;
    return pair | low | high << 16;
  }
#else
  static constexpr float kFactor = 1.f;

  template <ByteOrder kOrder>
  __device__ __forceinline__ static void widen(uint32_t word, uint32_t& first, uint32_t& second) {
    const uint32_t ordered = kOrder == ByteOrder::kAdjacent ? word : __byte_perm(word, 0, 0x3120);
    first = convert(static_cast<uint16_t>(ordered));
    second = convert(static_cast<uint16_t>(ordered >> 16));
  }

 private:
  __device__ __forceinline__ static uint32_t convert(uint16_t pair) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
    return halves;
  }
#endif
};

// The kCount codes in `words` as float32, in order, still to be multiplied by kFactor.
template <class Format, int kCount>
__device__ __forceinline__ void widen_to_float(const uint32_t* words, float (&values)[kCount]) {
  using W = Widen<Format>;
  constexpr int kPairs = kCount / 2;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    uint32_t pair;
    if constexpr (W::kBytes == 2) {
      pair = words[i];
    } else {
      uint32_t first, second;
      W::template widen<ByteOrder::kAdjacent>(words[i / 2], first, second);
      pair = i % 2 == 0 ? first : second;
    }
    if constexpr (W::kIsBf16) {
      values[2 * i] = __uint_as_float(pair << 16);
      values[2 * i + 1] = __uint_as_float(pair & 0xFFFF0000u);
    } else {
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
      values[2 * i] = both.x;
      values[2 * i + 1] = both.y;
    }
  }
}

}  // namespace quantattn::cuda
