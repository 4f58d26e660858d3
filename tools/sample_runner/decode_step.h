#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cache.h"
#include "device_memory.h"
#include "options.h"
#include "problem.h"

namespace sample_runner {

// What one decode step gave and how long it took.
struct DecodeResult {
  std::vector<double> out;       // [B, n, Hq, D]
  std::vector<float> lse;        // [B, n, Hq]
  bool is_reproducible = false;  // the last step's bits equal the first step's
  std::string backend, variant;
  int num_splits = 0, split_size = 0;
  int64_t workspace_bytes = 0;
  std::vector<double> step_ms;
};

// Plans once, warms up, and times the profiling iterations.
DecodeResult run_decode(const Problem& problem, const Cache& cache, const Options& options, DeviceMemory& memory);

}  // namespace sample_runner
