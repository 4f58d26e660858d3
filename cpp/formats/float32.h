#pragma once

#include "formats/float_bits.h"

namespace quantattn::formats {

// IEEE binary32: fresh keys and values only, no cache stores it. One vector = head_dim elements of four bytes. No scale.
struct Float32 {
  using Code = float;
  static constexpr bool kHasScale = false;

  QATTN_HOST_DEVICE static float decode(Code code) { return code; }
};

}  // namespace quantattn::formats
