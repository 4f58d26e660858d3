#pragma once

#include <span>

#include "core/backend.h"
#include "prefill/task.h"

namespace quantattn::cuda {

// The prefill kernels of one pair of formats, sorted by head_dim, then from the fastest to the one that needs least.
struct PairPrefill {
  KvPair format;
  std::span<const PrefillInstance> instances;
};

std::span<const PairPrefill* const> all_prefill_pairs();

std::span<const PrefillKernel> prefill_kernels();
PrefillPlan plan_prefill(const PrefillParams& params, const Execution& execution);
void run_prefill(const PrefillParams& params, const Execution& execution, const PrefillPlan& plan, void* scratch);

// Whether prefill kernels read the cache of a hybrid batch with its queries' dtype.
bool prefill_serves(const HybridParams& params);
// Which of them: kHopper where it serves the batch and no other is forced.
std::string_view prefill_variant_over_cache(const HybridParams& params, const Execution& execution);
// Computes the sequences of a hybrid batch that have at least `fewest_tokens` query tokens; leaves the others alone.
void run_prefill_over_cache(const HybridParams& params, const Execution& execution, int fewest_tokens);

}  // namespace quantattn::cuda
