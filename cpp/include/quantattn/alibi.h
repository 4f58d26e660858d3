#pragma once

#include <vector>

#include "quantattn/api.h"

namespace quantattn {

// Slopes of ALiBi (Press et al., arXiv:2108.12409): 2^(-8 i / n) for n a power of two; other counts take the slopes of the
// next lower power of two, then every other slope of the next higher one.
QATTN_API std::vector<float> get_alibi_slopes(int num_heads);

}  // namespace quantattn
