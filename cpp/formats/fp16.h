#pragma once

#include "formats/float_bits.h"

namespace quantattn::formats {

// IEEE binary16. One vector = one token of one KV head: head_dim elements of two bytes. No scale.
struct Fp16 {
  using Code = uint16_t;
  static constexpr bool kHasScale = false;

  QATTN_HOST_DEVICE static float decode(Code code) { return float_of_half(code); }
  QATTN_HOST_DEVICE static Code encode(float x) { return half_of_float(x); }
};

}  // namespace quantattn::formats
