#pragma once

#include "formats/float_bits.h"

namespace quantattn::formats {

// bfloat16. One vector = one token of one KV head: head_dim elements of two bytes. No scale.
struct Bf16 {
  using Code = uint16_t;
  static constexpr bool kHasScale = false;

  QATTN_HOST_DEVICE static float decode(Code code) { return float_of_bfloat16(code); }
  QATTN_HOST_DEVICE static Code encode(float x) { return bfloat16_of_float(x); }
};

}  // namespace quantattn::formats
