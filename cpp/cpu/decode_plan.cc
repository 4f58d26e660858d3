#include "cpu/decode_plan.h"

#include <algorithm>

#include "core/fail.h"
#include "cpu/decode.h"
#include "cpu/isa_table.h"
#include "cpu/item_runner.h"
#include "cpu/thread_pool.h"

namespace quantattn::cpu {
namespace {

constexpr int kBatchInvariantSplit = 1024;
constexpr int kMinSplit = 2 * kTileTokens;
// Sums over at most this many tokens run on in float32; longer ones are merged from parts, so that rounding does not pile up.
constexpr int kMaxSplit = 8192;
// Query rows of one item: as many KV heads as keep the rows' accumulators well within a 256 KB second-level cache.
constexpr int kRowsPerItem = 64;
// Items per thread that keep threads equally busy where lengths or cores differ.
constexpr int64_t kItemsPerThread = 2;
// Below this many key-rows per thread, waking a thread costs more than it saves.
constexpr int64_t kMinKeysPerThread = 512;

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace

DecodeSchedule::DecodeSchedule(const DecodeParams& params, int num_splits, int split_size)
    : params_(params),
      num_splits_(num_splits),
      split_size_(split_size),
      heads_per_block_(std::clamp(kRowsPerItem / rows_per_head(), 1, params.cache.num_kv_heads)) {}

int DecodeSchedule::num_heads_in(int64_t block) const {
  return static_cast<int>(std::min<int64_t>(heads_per_block_, params_.cache.num_kv_heads - block * heads_per_block_));
}

KeyRange DecodeSchedule::visible_to(int64_t b, int i) const {
  const int64_t position = int64_t{params_.seq_lens[b]} - params_.num_q_tokens + i;
  int64_t first = params_.seq_starts ? params_.seq_starts[b] : 0;
  if (params_.sliding_window > 0) first = std::max(first, position - params_.sliding_window + 1);
  return {first, position + 1};
}

KeyRange DecodeSchedule::visible(int64_t b) const {
  return {visible_to(b, 0).first, visible_to(b, params_.num_q_tokens - 1).end};
}

int64_t DecodeSchedule::num_parts(int64_t b) const {
  const KeyRange keys = visible(b);
  const int64_t count = std::max<int64_t>(keys.end - keys.first, 1);
  return num_splits_ > 0 ? std::min<int64_t>(num_splits_, count) : divide_up(count, split_size_);
}

KeyRange DecodeSchedule::part(int64_t b, int64_t index, int64_t num_parts) const {
  const KeyRange keys = visible(b);
  const int64_t count = std::max<int64_t>(keys.end - keys.first, 0);
  const int64_t size = num_splits_ > 0 ? divide_up(count, num_parts) : split_size_;
  const int64_t first = keys.first + index * size;
  return {first, std::min(first + size, keys.end)};
}

int64_t DecodeSchedule::partial_floats() const {
  return int64_t{rows_per_head()} * heads_per_block_ * (round_up(params_.cache.head_dim, kLanePadding) + 2);
}

WorkerLayout worker_layout(const Isa& isa, const DecodeSchedule& schedule, int head_dim) {
  const int rows = schedule.rows_per_head() * schedule.heads_per_block();
  const int padded = round_up(head_dim, kLanePadding);
  int64_t packed_row_bytes = 0;
  for (const ArithmeticStages& stages : isa.stages->arithmetics)
    if (stages.pack_queries) packed_row_bytes = std::max(packed_row_bytes, stages.query_row_bytes(head_dim));
  WorkerLayout layout{};
  int64_t end = 0;
  const auto place = [&end](int64_t bytes) {
    const int64_t start = end;
    end += align_up(bytes);
    return start;
  };
  layout.loaded = place(sizeof(LoadedQueries));
  layout.queries = place(int64_t{rows} * head_dim * 4);
  layout.packed_queries = place(rows * packed_row_bytes);
  layout.units = place(int64_t{schedule.heads_per_block()} * 4);
  layout.out = place(int64_t{rows} * padded * 4);
  layout.max = place(int64_t{rows} * 4);
  layout.sum = place(int64_t{rows} * 4);
  layout.keys = place(int64_t{kTileTokens} * padded * 4);
  layout.values = place(int64_t{kTileTokens} * padded * 4);
  layout.scores = place(int64_t{kRowBlock} * kTileTokens * 4);
  layout.bytes = end;
  return layout;
}

RunLayout run_layout(const DecodeParams& params, const DecodeSchedule& schedule) {
  int64_t num_partials = 0;
  for (int64_t b = 0; b < params.batch_size; ++b)
    if (const int64_t parts = schedule.num_parts(b); parts > 1) num_partials += parts;
  num_partials *= schedule.num_blocks();
  RunLayout layout{};
  layout.positions = 0;
  layout.arrivals = align_up(int64_t{params.batch_size} * static_cast<int64_t>(sizeof(SequencePosition)));
  const int64_t num_counters = num_partials > 0 ? params.batch_size * schedule.num_blocks() : 0;
  layout.partials = layout.arrivals + align_up(num_counters * 4);
  layout.workers = layout.partials + align_up(num_partials * schedule.partial_floats() * 4);
  return layout;
}

int resolve_num_threads(const Execution& execution) {
  require(execution.num_threads >= 0, "cpu: num_threads must be at least 0 (every core), got ", execution.num_threads);
  return execution.num_threads > 0 ? execution.num_threads : num_usable_cores();
}

DecodePlan plan_decode(const DecodeParams& params, const Execution& execution,
                       std::span<const DecodeKernel* const> candidates) {
  DecodePlan plan;
  const Isa& isa = execution.kernel.empty() ? preferred_isa() : isa_named(execution.kernel);
  for (const DecodeKernel* candidate : candidates)
    if (candidate->variant == isa.name) plan.kernel = candidate;
  plan.backend = "cpu";
  plan.variant = isa.name;

  const DecodeSchedule unsplit(params, 1, 0);
  int64_t num_keys = 0;
  for (int64_t b = 0; b < params.batch_size; ++b) {
    const KeyRange keys = unsplit.visible(b);
    num_keys += std::max<int64_t>(keys.end - keys.first, 0);
  }
  const int64_t num_head_keys = num_keys * params.cache.num_kv_heads;
  num_keys *= unsplit.num_blocks();
  const int64_t num_threads = std::clamp<int64_t>(num_head_keys / kMinKeysPerThread, 1, resolve_num_threads(execution));
  if (params.batch_invariant) {
    plan.split_size = kBatchInvariantSplit;
  } else if (params.num_splits == 0) {
    const int64_t share = num_threads == 1 ? num_keys : divide_up(num_keys, num_threads * kItemsPerThread);
    plan.split_size = static_cast<int>(std::clamp<int64_t>(divide_up(share, kTileTokens) * kTileTokens, kMinSplit, kMaxSplit));
  }
  const DecodeSchedule schedule(params, params.num_splits, plan.split_size);
  int64_t max_parts = 1, total_items = 0;
  for (int64_t b = 0; b < params.batch_size; ++b) {
    const int64_t parts = schedule.num_parts(b);
    max_parts = std::max(max_parts, parts);
    total_items += parts * schedule.num_blocks();
  }
  plan.num_splits = static_cast<int>(max_parts);
  const int64_t num_workers = std::min(num_threads, std::max<int64_t>(total_items, 1));
  plan.workspace_bytes =
      run_layout(params, schedule).workers + num_workers * worker_layout(isa, schedule, params.cache.head_dim).bytes;
  return plan;
}

}  // namespace quantattn::cpu
