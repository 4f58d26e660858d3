// Host side of hybrid_attention. Lengths are known on the device alone: each launch leaves alone the sequences that have too
// few or too many query tokens for it.
#include "hybrid/hybrid.h"

#include <algorithm>
#include <optional>

#include "core/fail.h"
#include "decode/decode_launch.h"
#include "decode/policy.h"
#include "hybrid/policy.h"
#include "prefill/instances.h"

namespace quantattn::cuda {
namespace {

constexpr std::string_view kHybrid = "hybrid_attention";

// The variant of a batch whose few query tokens the one computes and whose many the other.
constexpr std::string_view kTensorCoresAndHopper = "tensor_cores+hopper";

// The batch as the decoding kernel takes it. A lone sequence has all query tokens, which is a batch that is not ragged.
DecodeParams decode_params(const HybridParams& p) {
  DecodeParams params;
  params.q = p.q;
  params.out = p.out;
  params.q.outer_stride = params.out.outer_stride = 0;
  params.lse = p.lse;
  params.q_dtype = p.q_dtype;
  params.batch_size = p.batch_size;
  params.num_q_tokens = 0;
  params.num_q_heads = p.num_q_heads;
  params.cache = p.cache;
  params.page_table = p.page_table;
  params.max_pages = p.max_pages;
  params.seq_lens = p.seq_lens;
  params.seq_starts = p.seq_starts;
  params.sm_scale = p.sm_scale;
  params.alibi_slopes = p.alibi_slopes;
  params.sinks = p.sinks;
  params.sliding_window = p.sliding_window;
  params.logits_soft_cap = p.logits_soft_cap;
  params.num_splits = p.num_splits;
  params.batch_invariant = p.batch_invariant;
  return params;
}

// Sequences that one launch of the decoding kernel computes.
struct Range {
  int fewest_tokens, most_tokens;
};

// Row tiles of one KV head that the sequences of a range have at most.
int64_t most_row_tiles(const HybridParams& p, Range range, int rows) {
  const int64_t group = p.num_q_heads / p.cache.num_kv_heads;
  const int64_t num_sequences = std::min<int64_t>(p.batch_size, p.num_q_tokens / range.fewest_tokens);
  const int64_t num_tokens = std::min(p.num_q_tokens, num_sequences * range.most_tokens);
  return std::min(num_tokens * ceil_divide(group, rows), num_tokens * group / rows + num_sequences);
}

int64_t capacity_tiles(const HybridParams& p) {
  return std::max<int64_t>(1, ceil_divide(int64_t{p.max_pages} * p.cache.page_size, kTileTokens));
}

void deal_parts(DecodeLaunch& launch, int64_t num_items, int resident_blocks) {
  launch.split = WorkSplit::kDealtParts;
  const int64_t num_units = num_items * launch.max_parts;
  require(num_units <= INT32_MAX, kHybrid, ": num_q_tokens * num_kv_heads * num_splits must be below 2^31, got ", num_units);
  launch.num_units = static_cast<int>(num_units);
  launch.num_shared_units = launch.max_parts == 1 ? 0 : launch.num_units;
  launch.num_blocks = static_cast<int>(std::min<int64_t>(resident_blocks, num_units));
}

// Few query tokens: the keys of a sequence are cut, so that every warp of the device has some.
DecodeLaunch plan_few_tokens(const HybridParams& p, const Execution& execution, std::string_view variant) {
  const int num_kv_heads = p.cache.num_kv_heads;
  const int64_t guessed_rows = int64_t{guess_tokens(p)} * (p.num_q_heads / num_kv_heads);
  DecodeLaunch launch = {};
  const DecodeInstance& instance = choose_instance(kernels_of(p.cache.format), variant, p.cache.head_dim, guessed_rows);
  const int resident_blocks = set_instance(launch, instance, execution, kHybrid), num_warps = launch.warps_per_block;
  const int64_t num_columns = most_row_tiles(p, {1, kMostDecodedTokens}, instance.rows) * num_kv_heads;
  // Tiles of a whole batch are numbered in 31 bits.
  const bool is_fixed = p.num_splits > 0 || p.batch_invariant || num_columns * capacity_tiles(p) > INT32_MAX;
  const int64_t row_bytes = std::min<int64_t>(guessed_rows, instance.rows) * 4 * instance.head_dim;
  launch.columns_per_block =
      is_fixed ? (num_kv_heads % kFixedColumns == 0 && num_warps % kFixedColumns == 0 ? kFixedColumns : 1)
               : choose_columns(num_kv_heads, p.batch_size, capacity_tiles(p), num_warps, resident_blocks, row_bytes);
  launch.columns_divisor = num_kv_heads;
  launch.items_per_sequence = num_kv_heads / launch.columns_per_block;
  const int64_t num_items = num_columns / launch.columns_per_block;
  if (is_fixed) {
    launch.min_part_tiles = p.num_splits > 0 ? 1 : kInvariantPartTiles;
    const int64_t most = p.num_splits > 0 ? p.num_splits : kInvariantMaxParts;
    launch.max_parts = static_cast<int>(std::min(most, ceil_divide(capacity_tiles(p), launch.min_part_tiles)));
    deal_parts(launch, num_items, resident_blocks);
  } else {
    launch.split = WorkSplit::kEqualRanges;
    const int64_t guessed_columns = p.batch_size * ceil_divide(guessed_rows, instance.rows) * num_kv_heads;
    launch.num_blocks = static_cast<int>(
        std::min<int64_t>(resident_blocks, ceil_divide(guessed_columns * capacity_tiles(p), launch.warps_per_block)));
    launch.num_units = launch.num_shared_units = launch.num_blocks;
    if (has_equal_guess(p) && guessed_rows <= instance.rows) {
      launch.num_rows = static_cast<int>(guessed_rows);
      prepare_even_cut(launch, int64_t{p.batch_size} * launch.items_per_sequence, launch.num_blocks);
    }
  }
  return launch;
}

// Many query tokens of a batch that no prefill kernel serves: the rows alone are enough for every warp.
DecodeLaunch plan_many_tokens(const HybridParams& p, const Execution& execution, std::string_view variant, Range range) {
  const int num_kv_heads = p.cache.num_kv_heads;
  const int64_t least_rows = int64_t{range.fewest_tokens} * (p.num_q_heads / num_kv_heads);
  DecodeLaunch launch = {};
  const DecodeInstance& instance = choose_instance(kernels_of(p.cache.format), variant, p.cache.head_dim, least_rows);
  const int resident_blocks = set_instance(launch, instance, execution, kHybrid);
  launch.columns_per_block = 1;
  while (num_kv_heads % (2 * launch.columns_per_block) == 0 && 2 * launch.columns_per_block <= launch.warps_per_block)
    launch.columns_per_block *= 2;
  launch.columns_divisor = num_kv_heads;
  launch.items_per_sequence = num_kv_heads / launch.columns_per_block;
  launch.max_parts = 1;
  launch.min_part_tiles = 1;
  deal_parts(launch, most_row_tiles(p, range, instance.rows) * launch.items_per_sequence, resident_blocks);
  return launch;
}

// What a batch needs launched: known from B and T alone, so that a captured graph serves other lengths.
struct Launches {
  std::string_view variant;
  std::optional<DecodeLaunch> few, many;
  bool has_prefill = false;  // by the prefill kernels in place of `many`
};

Range range_of_many(const HybridParams& p) { return {kMostDecodedTokens + 1, static_cast<int>(p.num_q_tokens)}; }

Launches plan_launches(const HybridParams& p, const Execution& execution) {
  const std::string_view forced =
      execution.kernel.empty() ? variant_from_environment(execution, kHybrid, kDecodeVariants) : execution.kernel;
  Launches launches = {};
  // A constant, which outlives the caller's name of it.
  launches.variant = forced.empty() ? preferred_variant(p.q_dtype) : forced == kCudaCores ? kCudaCores : kTensorCores;
  if (p.batch_size == 0 || p.num_q_tokens == 0) return launches;
  require(p.num_q_tokens * p.num_q_heads < 1 << 30, kHybrid, ": num_q_tokens * num_q_heads must be below 2^30, got ",
          p.num_q_tokens * p.num_q_heads);
  const bool may_have_many = p.num_q_tokens > kMostDecodedTokens, may_have_few = p.batch_size > 1 || !may_have_many;
  launches.has_prefill = may_have_many && launches.variant == kTensorCores && prefill_serves(p);
  if (may_have_few) launches.few = plan_few_tokens(p, execution, launches.variant);
  if (may_have_many && !launches.has_prefill)
    launches.many = plan_many_tokens(p, execution, launches.variant, range_of_many(p));
  return launches;
}

void run_part(const HybridParams& p, const DecodeLaunch& launch, Range range, bool starts_early, const Execution& execution,
              Workspace workspace) {
  DecodeTask task = make_task(decode_params(p), launch, workspace);
  task.cu_seqlens_q = p.cu_seqlens_q;
  task.total_tokens = static_cast<int>(p.num_q_tokens);
  task.fewest_tokens = range.fewest_tokens;
  task.most_tokens = range.most_tokens;
  task.causal = p.causal;
  task.has_item_spans = range.fewest_tokens > 1;
  task.starts_early = starts_early;
  run(launch, task, execution, kHybrid);
}

}  // namespace

HybridPlan plan_hybrid(const HybridParams& params, const Execution& execution) {
  const Launches launches = plan_launches(params, execution);
  HybridPlan plan;
  plan.backend = "cuda";
  const bool has_hopper = launches.has_prefill && prefill_variant_over_cache(params, execution) == kHopper;
  plan.variant = has_hopper ? kTensorCoresAndHopper : launches.variant;
  plan.split_size = params.batch_invariant ? kInvariantPartTiles * kTileTokens : 0;
  if (launches.few)
    plan.num_splits = launches.few->split == WorkSplit::kDealtParts ? launches.few->max_parts : launches.few->num_blocks;
  // One after the other, the launches use the same memory.
  for (const auto* launch : {&launches.few, &launches.many}) {
    if (!*launch) continue;
    plan.workspace_bytes = std::max(plan.workspace_bytes, workspace_bytes(**launch));
    plan.counter_bytes = std::max(plan.counter_bytes, counter_bytes(**launch));
  }
  return plan;
}

void run_hybrid(const HybridParams& params, const Execution& execution, const HybridPlan&, Workspace workspace) {
  const Launches launches = plan_launches(params, execution);
  // The long part first: decoding begins on multiprocessors that its last blocks leave. It needs nothing of the prefill
  // kernels, which have no workspace. Where there is probably no long part, its launch comes where it delays nothing.
  const bool has_prefill_last = launches.has_prefill && launches.few && has_equal_guess(params);
  const auto prefill = [&] { run_prefill_over_cache(params, execution, kMostDecodedTokens + 1); };
  if (launches.has_prefill && !has_prefill_last) prefill();
  if (launches.many) run_part(params, *launches.many, range_of_many(params), false, execution, workspace);
  if (launches.few)
    run_part(params, *launches.few, {1, kMostDecodedTokens}, launches.has_prefill && !has_prefill_last, execution, workspace);
  if (has_prefill_last) prefill();
}

}  // namespace quantattn::cuda
