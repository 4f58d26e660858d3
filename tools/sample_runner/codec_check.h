#pragma once

#include <cstdint>

#include "cache.h"
#include "problem.h"

namespace sample_runner {

// How well the stored codes and scales describe the K or V that they were made from.
struct CodecCheck {
  double relative_l2 = 0;        // of dequantised against original
  int64_t num_wrong_codes = 0;   // elements whose code is not the nearest that the format has
  int64_t num_wrong_scales = 0;  // vectors whose dynamic scale clips, or is larger than rounding up to float16 makes it
};

// The cache must have been downloaded; the problem must not hold codes.
CodecCheck check_codec(const Problem& problem, const Cache& cache, Cache::Side side);

}  // namespace sample_runner
