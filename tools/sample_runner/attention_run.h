#pragma once

#include <optional>
#include <vector>

#include "attention_call.h"

namespace sample_runner {

// Times of the two kinds of sequences of a hybrid batch when each kind has a call of its own; empty where there are none.
struct PartTimes {
  std::vector<double> prefill_ms, decode_ms;
};

// What attention over the whole batch gave and how long it took.
struct AttentionResult {
  std::vector<double> out;       // [T, Hq, D]
  std::vector<float> lse;        // [T, Hq]
  bool is_reproducible = false;  // the last call's bits equal the first call's
  PlanFacts plan;
  std::vector<double> step_ms;
  std::optional<PartTimes> parts;  // of hybrid batches
};

// Plan once, warm up, and time the profiling iterations.
AttentionResult run_over_cache(const Problem& problem, const Cache& cache, const Options& options, DeviceMemory& memory);
AttentionResult run_over_fresh(const Problem& problem, const FreshKv& kv, const Options& options, DeviceMemory& memory);

// The sequences that prefill, or those that decode.
std::vector<int> sequences_of_kind(const Problem& problem, bool is_prefill);

}  // namespace sample_runner
