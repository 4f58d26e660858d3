#pragma once

#include <cstdint>

namespace quantattn::cpu {

// Result of some keys for some query rows: not yet divided by the sum.
struct PartialResult {
  float* out;  // [rows, padded head_dim]
  float* max;  // [rows]
  float* sum;  // [rows]
};

// The result of no keys.
void clear(const PartialResult& result, int64_t num_rows, int64_t row_floats);
// Adds the result of other keys. The order of such additions decides how sums are rounded.
void add(const PartialResult& total, const PartialResult& added, int64_t num_rows, int64_t row_floats);

}  // namespace quantattn::cpu
