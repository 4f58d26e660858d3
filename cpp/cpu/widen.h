#pragma once

#include "cpu/simd.h"
#include "formats/float_bits.h"

// kLanes consecutive codes to float32, in units of kUnit, a power of two. The primary template works from Format::decode alone;
// a specialisation is worth its lines where a tile of the format is multiplied in float32.
namespace quantattn::formats {
struct Float32;
struct Fp16;
struct Bf16;
struct Int8;
struct Fp8E4M3;
struct Fp8E5M2;
}  // namespace quantattn::formats

namespace quantattn::cpu::QATTN_ISA {

typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));

template <class Vector>
QATTN_INLINE Vector load_codes(const void* codes) {
  Vector x;
  memcpy(&x, codes, sizeof x);
  return x;
}

template <class N = Native>
QATTN_INLINE F32 half_to_float(Halves halves) {
  if constexpr (requires(typename N::Halves native) { N::half_to_float(native); }) {
    return bits<F32>(N::half_to_float(bits<typename N::Halves>(halves)));
  } else {
    const I32 half = __builtin_convertvector(halves, I32);
    const I32 magnitude = (half & 0x7FFF) << 13, sign = (half & 0x8000) << 16;
    const I32 special = magnitude >= 0x7C00 << 13 ? broadcast(0x7F800000) : I32{};  // infinity and NaN
    const F32 finite = bits<F32>(magnitude) * 0x1p112f;  // the exponents' biases differ by 112; exact for subnormals too
    return bits<F32>(bits<I32>(finite) | sign | special);
  }
}
QATTN_INLINE F32 half_to_float(const uint16_t* halves) { return half_to_float(load_codes<Halves>(halves)); }

// kLanes bytes to lanes of 32 and of 16 bits.
template <class N = Native>
QATTN_INLINE I32 sign_extend(const void* bytes) {
  if constexpr (requires { N::sign_extend(bytes); })
    return bits<I32>(N::sign_extend(bytes));
  else
    return __builtin_convertvector(load_codes<SignedBytes>(bytes), I32);
}
template <class N = Native>
QATTN_INLINE Halves zero_extend(const void* bytes) {
  if constexpr (requires { N::zero_extend(bytes); })
    return bits<Halves>(N::zero_extend(bytes));
  else
    return __builtin_convertvector(load_codes<Bytes>(bytes), Halves);
}

// 16-bit words to the high halves of 32-bit lanes: bfloat16 to float32.
template <class N = Native>
QATTN_INLINE I32 words_to_high_halves(Halves words) {
  if constexpr (requires(typename N::Halves native) { N::words_to_high_halves(native); })
    return bits<I32>(N::words_to_high_halves(bits<typename N::Halves>(words)));
  else
    return __builtin_convertvector(words, I32) << 16;
}

template <class Format>
struct Widen {
  static constexpr float kUnit = 1.f;
  QATTN_INLINE F32 load(const typename Format::Code* codes) {
    F32 x;
    for (int i = 0; i < kLanes; ++i) x[i] = Format::decode(codes[i]);
    return x;
  }
};

template <>
struct Widen<formats::Float32> {
  static constexpr float kUnit = 1.f;
  QATTN_INLINE F32 load(const float* codes) { return quantattn::cpu::QATTN_ISA::load(codes); }
};

template <>
struct Widen<formats::Fp16> {
  static constexpr float kUnit = 1.f;
  QATTN_INLINE F32 load(const uint16_t* codes) { return half_to_float(codes); }
};

template <>
struct Widen<formats::Bf16> {
  static constexpr float kUnit = 1.f;
  QATTN_INLINE F32 load(const uint16_t* codes) { return bits<F32>(words_to_high_halves(load_codes<Halves>(codes))); }
};

template <>
struct Widen<formats::Int8> {
  static constexpr float kUnit = 1.f;
  QATTN_INLINE F32 load(const int8_t* codes) { return to_float(sign_extend(codes)); }
};

template <>
struct Widen<formats::Fp8E4M3> {
  // As the half with the same exponent and mantissa fields, whose bias is larger by 8: exact for subnormals too.
  static constexpr float kUnit = 0x1p8f;
  QATTN_INLINE F32 load(const uint8_t* codes) {
    typedef int16_t SignedHalves __attribute__((vector_size(kLanes * 2)));
    const Halves code = zero_extend(codes), half = bits<Halves>(bits<SignedHalves>(code << 8) >> 1) & 0xBFFF;
    return half_to_float((code & 0x7F) == 0x7F ? Halves{} + 0x7E00 : half);
  }
};

template <>
struct Widen<formats::Fp8E5M2> {
  static constexpr float kUnit = 1.f;
  QATTN_INLINE F32 load(const uint8_t* codes) { return half_to_float(zero_extend(codes) << 8); }
};

// The first `count` codes, zeros after them; nothing past them is read.
template <class Format>
QATTN_INLINE F32 load_some(const typename Format::Code* codes, int count) {
  if (count >= kLanes) return Widen<Format>::load(codes);
  typename Format::Code some[kLanes] = {};
  memcpy(some, codes, sizeof some[0] * static_cast<size_t>(count));
  const F32 lanes = to_float(lane_numbers());
  return lanes < static_cast<float>(count) ? Widen<Format>::load(some) : F32{};
}

}  // namespace quantattn::cpu::QATTN_ISA
