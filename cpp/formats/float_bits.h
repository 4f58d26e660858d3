#pragma once

#include <cstdint>
#include <cstring>

#include "quantattn/types.h"

// IEEE binary16 and bfloat16 as bit patterns, in integer arithmetic: the same bits on every backend, whatever the
// floating-point environment says about subnormals.
namespace quantattn::formats {

QATTN_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

QATTN_HOST_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

QATTN_HOST_DEVICE float float_of_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, mantissa = half & 0x3FFu;
  if (exponent == 31) return float_of(sign | 0x7F800000u | mantissa << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal: a multiple of 2^-24, normal in float32
  return float_of(sign | bits_of(magnitude));
}

// Round to nearest even; overflow gives infinity, NaN stays NaN.
QATTN_HOST_DEVICE uint16_t half_of_float(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | (magnitude >> 13 & 0x1FFu));
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and above
  if (magnitude >= 0x38800000u) {                                              // 2^-14 and above: a normal half
    const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
  }
  if (magnitude < 0x33000000u) return static_cast<uint16_t>(sign);  // below 2^-25: half of the smallest subnormal
  const int shift = 126 - static_cast<int>(magnitude >> 23);        // the result counts units of 2^-24
  const uint32_t mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
  const uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), tie = 1u << (shift - 1);
  return static_cast<uint16_t>(sign | (kept + (rest > tie || (rest == tie && (kept & 1u)))));
}

// The smallest half not below x, for finite x >= 0; at most 65504.
QATTN_HOST_DEVICE uint16_t half_not_below(float x) {
  if (x > 65504.f) return 0x7BFFu;
  const uint16_t nearest = half_of_float(x);
  return float_of_half(nearest) < x ? static_cast<uint16_t>(nearest + 1) : nearest;
}

QATTN_HOST_DEVICE float float_of_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// Round to nearest even; NaN stays NaN.
QATTN_HOST_DEVICE uint16_t bfloat16_of_float(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace quantattn::formats
