#pragma once

#include "formats/float_bits.h"

namespace quantattn::formats {

// |x| where x is finite, else 0: infinities and NaN do not set a vector's scale.
QATTN_HOST_DEVICE float finite_magnitude(float x) {
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  return magnitude < 0x7F800000u ? float_of(magnitude) : 0.f;
}

// The dynamic scale of a vector whose largest finite magnitude is `amax`, as float16 bits: rounded up, so nothing clips.
template <class Format>
QATTN_HOST_DEVICE uint16_t dynamic_scale(float amax) {
  return half_not_below(amax / Format::kMaxCode);
}

// A vector that a scale of zero describes is all zeros. NaN is not divided: a GPU's quotient would lose its sign.
template <class Format>
QATTN_HOST_DEVICE typename Format::Code encode_scaled(float x, float scale) {
  return scale > 0.f ? Format::encode(x == x ? x / scale : x) : typename Format::Code{0};
}

// A key as it is encoded where its channel has an offset. NaN is not subtracted from: a GPU's difference would lose its sign.
QATTN_HOST_DEVICE float without_offset(float x, float offset) { return x == x ? x - offset : x; }

}  // namespace quantattn::formats
