#pragma once

#include "cpu/simd.h"
#include "cpu/stages.h"
#include "cpu/widen.h"
#include "formats/float_bits.h"

// Conversions between the caller's dtype and float32.
namespace quantattn::cpu::QATTN_ISA {

inline void load_values(const void* values, DType dtype, int count, float factor, float* out) {
  const auto* words = static_cast<const uint16_t*>(values);
  if (dtype == DType::kFloat16)
    for (int i = 0; i < count; ++i) out[i] = formats::float_of_half(words[i]) * factor;
  else if (dtype == DType::kBFloat16)
    for (int i = 0; i < count; ++i) out[i] = formats::float_of_bfloat16(words[i]) * factor;
  else
    for (int i = 0; i < count; ++i) out[i] = static_cast<const float*>(values)[i] * factor;
}

inline void store_values(const float* values, float factor, int count, DType dtype, void* out) {
  auto* words = static_cast<uint16_t*>(out);
  if (dtype == DType::kFloat16)
    for (int i = 0; i < count; ++i) words[i] = formats::half_of_float(values[i] * factor);
  else if (dtype == DType::kBFloat16)
    for (int i = 0; i < count; ++i) words[i] = formats::bfloat16_of_float(values[i] * factor);
  else
    for (int i = 0; i < count; ++i) static_cast<float*>(out)[i] = values[i] * factor;
}

inline void load_half_scales(const uint16_t* halves, float* out) {
  for (int i = 0; i < kTileTokens; i += kLanes) store(out + i, half_to_float(halves + i));
}

}  // namespace quantattn::cpu::QATTN_ISA
