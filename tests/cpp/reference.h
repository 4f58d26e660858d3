#pragma once

#include <cstdint>
#include <vector>

#include "quantattn/decode.h"
#include "quantattn/hybrid.h"
#include "quantattn/prefill.h"

// Attention and codecs by definition, in float64, independent of cpp/formats.
namespace quantattn_test {

// The number that a stored code stands for, without its scale.
double decode_code(quantattn::KvFormat format, const void* codes, int64_t index);
double decode_half(uint16_t bits);
// The smallest float16 not below x, found by trying every one; at most 65504.
double smallest_half_not_below(float x);

// Element `index` of an array.
double decode_number(quantattn::DType dtype, const void* numbers, int64_t index);

struct ReferenceResult {
  std::vector<double> out;  // [B, n, Hq, D] or [T, Hq, D]
  std::vector<double> lse;  // [B, n, Hq] or [T, Hq]
};
ReferenceResult reference_decode(const quantattn::DecodeParams& params);
ReferenceResult reference_hybrid(const quantattn::HybridParams& params);
ReferenceResult reference_prefill(const quantattn::PrefillParams& params);

}  // namespace quantattn_test
