#pragma once

#include <cmath>

#include "formats/float_bits.h"

namespace quantattn::formats {

// Symmetric int8. One vector = one token of one KV head: head_dim two's-complement bytes in [-127, 127].
// x ~ code * scale; round half to even, saturating; -128 is never written (and decodes as -128). NaN encodes as 0.
struct Int8 {
  using Code = int8_t;
  static constexpr bool kHasScale = true;
  static constexpr float kMaxCode = 127.f;

  QATTN_HOST_DEVICE static float decode(Code code) { return static_cast<float>(code); }
  // `x` is already divided by the scale.
  QATTN_HOST_DEVICE static Code encode(float x) {
    const float clamped = x > kMaxCode ? kMaxCode : x < -kMaxCode ? -kMaxCode : x == x ? x : 0.f;
    return static_cast<Code>(rintf(clamped));
  }
};

}  // namespace quantattn::formats
