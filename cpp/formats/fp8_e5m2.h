#pragma once

#include <cmath>

#include "formats/float_bits.h"

namespace quantattn::formats {

// OCP 8-bit float E5M2 (Micikevicius et al., arXiv:2209.05433): the upper byte of an IEEE binary16.
// One vector = one token of one KV head: head_dim bytes, x ~ value(code) * scale.
//   bit 7 sign; bits 2..6 exponent e, bias 15; bits 0..1 mantissa m
//   e = 0: m * 2^-16; e = 31: infinity (m = 0) or NaN; otherwise (4 + m) * 2^(e - 17); the largest finite value is 57344
// Encoding rounds to nearest even and saturates, infinities included; NaN stays NaN.
struct Fp8E5M2 {
  using Code = uint8_t;
  static constexpr bool kHasScale = true;
  static constexpr float kMaxCode = 57344.f;

  QATTN_HOST_DEVICE static float decode(Code code) { return float_of_half(static_cast<uint16_t>(code << 8)); }
  // `x` is already divided by the scale.
  QATTN_HOST_DEVICE static Code encode(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<Code>(sign | 0x7Fu);
    if (magnitude >= 0x47600000u) return static_cast<Code>(sign | 0x7Bu);  // 57344 and above
    if (magnitude < 0x38800000u)                                           // below 2^-14: multiples of 2^-16
      return static_cast<Code>(sign | static_cast<uint32_t>(rintf(float_of(magnitude) * 0x1p16f)));
    const uint32_t rounded = magnitude + 0xFFFFFu + (magnitude >> 21 & 1u);
    return static_cast<Code>(sign | ((rounded >> 21) - (112u << 2)));
  }
};

}  // namespace quantattn::formats
