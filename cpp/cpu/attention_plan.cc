#include <algorithm>

#include "core/fail.h"
#include "cpu/attention.h"
#include "cpu/isa_table.h"
#include "cpu/schedule.h"
#include "cpu/thread_pool.h"

namespace quantattn::cpu {
namespace {

constexpr int kMinSplit = 2 * kTileTokens;
// Items per thread that keep threads equally busy where lengths or cores differ.
constexpr int64_t kItemsPerThread = 2;
// Below this many keys and KV heads per thread, waking a thread costs more than it saves.
constexpr int64_t kMinKeysPerThread = 512;

const Isa& isa_for(const Execution& execution) {
  return execution.kernel.empty() ? preferred_isa() : isa_named(execution.kernel);
}

// What a call has to read.
struct CallSize {
  int64_t head_keys = 0;   // keys of all KV heads; of a sequence with many query tokens, as often as they are used
  int64_t block_keys = 0;  // keys of all items of the sequences with few query tokens, unsplit
};

CallSize size_of(const AttentionBatch& batch) {
  const Schedule unsplit(batch, 1, 0);
  CallSize size;
  for (int64_t b = 0; b < batch.batch_size; ++b) {
    const SequenceWork work = unsplit.work_of(b);
    if (work.num_items() == 0) continue;
    const KeyRange keys = batch.visible_to(batch.sequence(b), 0, work.num_q_tokens);
    const int64_t num_keys = std::max<int64_t>(keys.end - keys.first, 0);
    size.head_keys += num_keys * batch.cache.num_kv_heads * divide_up(work.num_q_tokens, kMaxDecodeTokens);
    if (work.num_q_tokens <= kMaxDecodeTokens) size.block_keys += num_keys * work.num_head_blocks;
  }
  return size;
}

int64_t num_threads_for(const CallSize& size, const Execution& execution) {
  return std::clamp<int64_t>(size.head_keys / kMinKeysPerThread, 1, resolve_num_threads(execution));
}

// Tokens of a part where the caller leaves the choice.
int chosen_split(const CallSize& size, int64_t num_threads) {
  const int64_t share = num_threads == 1 ? size.block_keys : divide_up(size.block_keys, num_threads * kItemsPerThread);
  return static_cast<int>(std::clamp<int64_t>(divide_up(share, kTileTokens) * kTileTokens, kMinSplit, kMaxSplit));
}

// Fills what plans of decode and of hybrid batches have in common.
template <class Params, class Plan>
void fill_plan(const Params& params, const Execution& execution, Plan* plan) {
  const AttentionBatch batch = batch_of(params);
  const Isa& isa = isa_for(execution);
  const CallSize size = size_of(batch);
  const int64_t num_threads = num_threads_for(size, execution);
  plan->backend = "cpu";
  plan->variant = isa.name;
  if (params.batch_invariant)
    plan->split_size = kBatchInvariantSplit;
  else if (params.num_splits == 0)
    plan->split_size = chosen_split(size, num_threads);
  const RunLayout layout = run_layout(batch, Schedule(batch, params.num_splits, plan->split_size), isa);
  plan->num_splits = static_cast<int>(layout.max_parts);
  plan->workspace_bytes = layout.bytes_for(num_threads);
}

}  // namespace

DecodePlan plan_decode(const DecodeParams& params, const Execution& execution,
                       std::span<const DecodeKernel* const> candidates) {
  DecodePlan plan;
  fill_plan(params, execution, &plan);
  for (const DecodeKernel* candidate : candidates)
    if (candidate->variant == plan.variant) plan.kernel = candidate;
  return plan;
}

HybridPlan plan_hybrid(const HybridParams& params, const Execution& execution) {
  HybridPlan plan;
  fill_plan(params, execution, &plan);
  return plan;
}

PrefillPlan plan_prefill(const PrefillParams& params, const Execution& execution) {
  const AttentionBatch batch = batch_of(params);
  const Isa& isa = isa_for(execution);
  const RunLayout layout = run_layout(batch, Schedule(batch, 0, kBatchInvariantSplit), isa);
  return {"cpu", isa.name, layout.bytes_for(num_threads_for(size_of(batch), execution))};
}

}  // namespace quantattn::cpu
