#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "options.h"
#include "problem.h"

namespace sample_runner {

// The scales of K or of V before they have a place in a cache.
struct ScaleValues {
  quantattn::ScaleGranularity granularity = quantattn::ScaleGranularity::kNone;
  std::vector<float> per_head;      // kTensor: one; kHead: [Hkv]
  std::vector<uint16_t> per_token;  // kTokenHead of loaded codes: float16 [B, L, Hkv]; empty: the library derives them
  int64_t tokens_per_sequence = 0;  // L of per_token
};

// Given values, a file, or derived from the largest magnitude of the data. `option` is "--k-scale" or "--v-scale".
ScaleValues make_scales(std::string_view option, const ScaleSpec& spec, quantattn::KvFormat format, const RowSource& rows,
                        const Problem& problem);

}  // namespace sample_runner
