#pragma once

#include "cpu/simd.h"
#include "cpu/stages.h"
#include "cpu/widen.h"
#include "formats/float_bits.h"

// Conversions between the caller's dtype and float32.
namespace quantattn::cpu::QATTN_ISA {

inline void load_values(const void* values, DType dtype, int count, float* out) {
  const auto* words = static_cast<const uint16_t*>(values);
  int i = 0;
  if (dtype == DType::kFloat16) {
    for (; i + kLanes <= count; i += kLanes) store(out + i, half_to_float(words + i));
    for (; i < count; ++i) out[i] = formats::float_of_half(words[i]);
  } else if (dtype == DType::kBFloat16) {
    for (; i < count; ++i) out[i] = formats::float_of_bfloat16(words[i]);
  } else {
    for (; i < count; ++i) out[i] = static_cast<const float*>(values)[i];
  }
}

template <class N = Native>
inline void store_values(const float* values, float factor, int count, DType dtype, void* out) {
  auto* words = static_cast<uint16_t*>(out);
  int i = 0;
  if (dtype == DType::kFloat16) {
    if constexpr (requires(F32 x) { N::float_to_half(x, words); })
      for (; i + kLanes <= count; i += kLanes) N::float_to_half(load(values + i) * factor, words + i);
    for (; i < count; ++i) words[i] = formats::half_of_float(values[i] * factor);
  } else if (dtype == DType::kBFloat16) {
    for (; i < count; ++i) words[i] = formats::bfloat16_of_float(values[i] * factor);
  } else {
    for (; i < count; ++i) static_cast<float*>(out)[i] = values[i] * factor;
  }
}

// Integers up to kWordLimit leave queries room for 2^31 / (kWordLimit * sum |q|) of their own, and each rounding contributes
// unit / sqrt(12) for every element; keys are taken to be a third of their largest.
inline float coarsest_unit(const float* queries, int num_rows, int head_dim) {
  float worst = 0.f;
  for (int row = 0; row < num_rows; ++row, queries += head_dim) {
    F32 sum = {}, square = {};
    for (int i = 0; i < head_dim; i += kLanes) {
      const F32 x = bits<F32>(load_words(queries + i, head_dim - i));
      sum += x < 0.f ? -x : x;
      square += x * x;
    }
    const float query_unit = sum_of_lanes(sum) * kWordLimit / 0x1p31f;
    const float error =
        __builtin_sqrtf(static_cast<float>(head_dim)) * (kWordLimit / 3.f) * query_unit + __builtin_sqrtf(sum_of_lanes(square));
    worst = error > worst ? error : worst;
  }
  return 0x1p-10f * 3.4641016f / worst;
}

inline ScaleRange range_of(const float* scales) {
  F32 negated = {}, largest = {};
  for (int i = 0; i < kTileTokens; i += kLanes) {
    const F32 x = load(scales + i);
    negated = max(-x, negated);
    largest = max(x, largest);
  }
  return {-max_of_lanes(negated), max_of_lanes(largest)};
}

inline float dot_product(const float* a, const float* b, int count) {
  F32 sum = {};
  for (int i = 0; i < count; i += kLanes) sum += load_row(a, i, count) * load_row(b, i, count);
  return sum_of_lanes(sum);
}

inline void load_half_scales(const uint16_t* halves, float factor, float* out) {
  for (int i = 0; i < kTileTokens; i += kLanes) store(out + i, half_to_float(halves + i) * factor);
}

}  // namespace quantattn::cpu::QATTN_ISA
