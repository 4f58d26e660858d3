#include "cpu/partial_result.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace quantattn::cpu {

void clear(const PartialResult& result, int64_t num_rows, int64_t row_floats) {
  std::fill(result.out, result.out + num_rows * row_floats, 0.f);
  std::fill(result.max, result.max + num_rows, -std::numeric_limits<float>::infinity());
  std::fill(result.sum, result.sum + num_rows, 0.f);
}

void add(const PartialResult& total, const PartialResult& added, int64_t num_rows, int64_t row_floats) {
  for (int64_t row = 0; row < num_rows; ++row) {
    if (added.sum[row] == 0.f) continue;
    const float max = std::max(total.max[row], added.max[row]);
    const float keep = std::exp(total.max[row] - max), take = std::exp(added.max[row] - max);
    float* out = total.out + row * row_floats;
    const float* from = added.out + row * row_floats;
    for (int64_t i = 0; i < row_floats; ++i) out[i] = out[i] * keep + from[i] * take;
    total.sum[row] = total.sum[row] * keep + added.sum[row] * take;
    total.max[row] = max;
  }
}

}  // namespace quantattn::cpu
