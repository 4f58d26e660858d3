#pragma once

#include <cstdint>
#include <vector>

#include "quantattn/decode.h"

// Attention and codecs by definition, in float64, independent of cpp/formats.
namespace quantattn_test {

// The number that a stored code stands for, without its scale.
double decode_code(quantattn::KvFormat format, const void* codes, int64_t index);
double decode_half(uint16_t bits);
// The smallest float16 not below x, found by trying every one; at most 65504.
double smallest_half_not_below(float x);

struct ReferenceResult {
  std::vector<double> out;  // [B, n, Hq, D]
  std::vector<double> lse;  // [B, n, Hq]
};
// q holds float32.
ReferenceResult reference_decode(const quantattn::DecodeParams& params);

}  // namespace quantattn_test
