#pragma once

#include <cmath>

#include "formats/float_bits.h"

namespace quantattn::formats {

// OCP 8-bit float E4M3 ("fn": no infinities; Micikevicius et al., arXiv:2209.05433).
// One vector = one token of one KV head: head_dim bytes, x ~ value(code) * scale.
//   bit 7 sign; bits 3..6 exponent e, bias 7; bits 0..2 mantissa m
//   e = 0: m * 2^-9; otherwise (8 + m) * 2^(e - 10); 0x7F and 0xFF are NaN; the largest value is 448
// Encoding rounds to nearest even and saturates, infinities included; NaN stays NaN.
struct Fp8E4M3 {
  using Code = uint8_t;
  static constexpr bool kHasScale = true;
  static constexpr float kMaxCode = 448.f;

  QATTN_HOST_DEVICE static float decode(Code code) {
    const uint32_t sign = (code & 0x80u) << 24, exponent = code >> 3 & 15u, mantissa = code & 7u;
    if ((code & 0x7Fu) == 0x7Fu) return float_of(sign | 0x7FC00000u);
    if (exponent != 0) return float_of(sign | (exponent + 120) << 23 | mantissa << 20);
    return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-9f));
  }
  // `x` is already divided by the scale.
  QATTN_HOST_DEVICE static Code encode(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<Code>(sign | 0x7Fu);
    if (magnitude >= 0x43E00000u) return static_cast<Code>(sign | 0x7Eu);  // 448 and above
    if (magnitude < 0x3C800000u)                                           // below 2^-6: multiples of 2^-9
      return static_cast<Code>(sign | static_cast<uint32_t>(rintf(float_of(magnitude) * 0x1p9f)));
    const uint32_t rounded = magnitude + 0x7FFFFu + (magnitude >> 20 & 1u);
    return static_cast<Code>(sign | ((rounded >> 20) - (120u << 3)));
  }
};

}  // namespace quantattn::formats
