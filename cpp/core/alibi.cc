#include "quantattn/alibi.h"

#include <bit>
#include <cmath>

#include "core/fail.h"

namespace quantattn {

std::vector<float> get_alibi_slopes(int num_heads) {
  require(num_heads >= 1, "get_alibi_slopes: num_heads must be at least 1, got ", num_heads);
  const int lower = static_cast<int>(std::bit_floor(static_cast<unsigned>(num_heads)));
  std::vector<float> slopes;
  slopes.reserve(static_cast<size_t>(num_heads));
  for (int i = 1; i <= lower; ++i) slopes.push_back(static_cast<float>(std::exp2(-8.0 * i / lower)));
  for (int i = 1; static_cast<int>(slopes.size()) < num_heads; i += 2)
    slopes.push_back(static_cast<float>(std::exp2(-8.0 * i / (2.0 * lower))));
  return slopes;
}

}  // namespace quantattn
