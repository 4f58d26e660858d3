#pragma once

#include "cpu/simd.h"
#include "cpu/stages.h"
#include "formats/scale.h"

// Formats applied to vectors of elements. Compiled without contraction of floating-point expressions, so that every
// instruction set writes the same codes.
namespace quantattn::cpu::QATTN_ISA {

template <class Format>
struct VectorCodec {
  using Code = typename Format::Code;

  static uint16_t dynamic_scale(const float* values, int count) {
    if constexpr (Format::kHasScale) {
      float amax = 0.f;
      for (int i = 0; i < count; ++i) {
        const float magnitude = formats::finite_magnitude(values[i]);
        amax = magnitude > amax ? magnitude : amax;
      }
      return formats::dynamic_scale<Format>(amax);
    } else {
      return 0;
    }
  }

  static void encode(const float* values, float scale, int count, void* codes) {
    auto* out = static_cast<Code*>(codes);
    if constexpr (Format::kHasScale)
      for (int i = 0; i < count; ++i) out[i] = formats::encode_scaled<Format>(values[i], scale);
    else
      for (int i = 0; i < count; ++i) out[i] = Format::encode(values[i]);
  }

  static void decode(const void* codes, float scale, int count, float* values) {
    const auto* in = static_cast<const Code*>(codes);
    if constexpr (Format::kHasScale)
      for (int i = 0; i < count; ++i) values[i] = Format::decode(in[i]) * scale;
    else
      for (int i = 0; i < count; ++i) values[i] = Format::decode(in[i]);
  }
};

template <class Format>
inline constexpr FormatCodec kVectorCodec = {VectorCodec<Format>::dynamic_scale, VectorCodec<Format>::encode,
                                             VectorCodec<Format>::decode};

}  // namespace quantattn::cpu::QATTN_ISA
