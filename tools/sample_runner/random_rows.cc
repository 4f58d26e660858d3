#include "random_rows.h"

#include <cmath>
#include <numbers>

namespace sample_runner {

uint64_t mix(uint64_t seed, uint64_t word) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u * (word + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

void fill_normal(uint64_t seed, std::span<float> values) {
  for (size_t i = 0; i < values.size(); i += 2) {
    const uint64_t word = mix(seed, i);
    // 24 random bits each; the radius takes (0, 1], so its logarithm is finite.
    const float radius_uniform = (static_cast<float>(word >> 40) + 1.f) * 0x1p-24f;
    const float angle = static_cast<float>(word & 0xFFFFFFu) * 0x1p-24f * 2.f * std::numbers::pi_v<float>;
    const float radius = std::sqrt(-2.f * std::log(radius_uniform));
    values[i] = radius * std::cos(angle);
    if (i + 1 < values.size()) values[i + 1] = radius * std::sin(angle);
  }
}

}  // namespace sample_runner
