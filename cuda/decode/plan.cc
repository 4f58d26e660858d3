// Host side of decode_attention: which kernel, which grid, how much workspace. Reads host values only.
#include <algorithm>
#include <vector>

#include "core/fail.h"
#include "decode/decode_launch.h"
#include "decode/policy.h"
#include "device.h"

namespace quantattn::cuda {

static constexpr std::string_view kDecode = "decode_attention";

DecodeLaunch plan_launch(const DecodeParams& p, const Execution& execution, std::string_view variant) {
  DecodeLaunch launch = {};
  launch.num_rows = p.num_q_tokens * (p.num_q_heads / p.cache.num_kv_heads);
  const DecodeInstance& instance = choose_instance(kernels_of(p.cache.format), variant, p.cache.head_dim, launch.num_rows);
  const int resident_blocks = set_instance(launch, instance, execution, kDecode);
  launch.columns_divisor = static_cast<int>(ceil_divide(launch.num_rows, launch.instance->rows));
  const int num_columns = p.cache.num_kv_heads * launch.columns_divisor;
  const int64_t row_bytes = std::min(launch.num_rows, launch.instance->rows) * int64_t{4} * launch.instance->head_dim;
  const int64_t capacity_tiles = std::max<int64_t>(1, ceil_divide(int64_t{p.max_pages} * p.cache.page_size, kTileTokens));
  // Tiles of a whole batch are numbered in 31 bits.
  const bool is_fixed =
      p.num_splits > 0 || p.batch_invariant || int64_t{p.batch_size} * num_columns * capacity_tiles > INT32_MAX;
  launch.columns_per_block =
      is_fixed ? (num_columns % kFixedColumns == 0 && launch.warps_per_block % kFixedColumns == 0 ? kFixedColumns : 1)
               : choose_columns(num_columns, p.batch_size, capacity_tiles, launch.warps_per_block, resident_blocks, row_bytes);
  launch.items_per_sequence = num_columns / launch.columns_per_block;
  const int64_t num_items = int64_t{p.batch_size} * launch.items_per_sequence;
  int64_t num_blocks = 0;
  // A lone sequence is cut at the ends of its items, so that no block has two items to finish.
  const bool is_alone = !is_fixed && p.batch_size == 1 && num_items <= resident_blocks;
  if (is_fixed) {
    launch.split = WorkSplit::kFixedParts;
    launch.min_part_tiles = p.num_splits > 0 ? 1 : kInvariantPartTiles;
    const int64_t most = p.num_splits > 0 ? p.num_splits : kInvariantMaxParts;
    launch.max_parts = static_cast<int>(std::min(most, ceil_divide(capacity_tiles, launch.min_part_tiles)));
    num_blocks = num_items * launch.max_parts;
  } else if (is_alone) {
    launch.split = WorkSplit::kFixedParts;
    launch.min_part_tiles = launch.warps_per_block / launch.columns_per_block;
    launch.max_parts =
        static_cast<int>(std::min(resident_blocks / num_items, ceil_divide(capacity_tiles, launch.min_part_tiles)));
    num_blocks = num_items * launch.max_parts;
  } else {
    launch.split = WorkSplit::kEqualRanges;
    // A resident grid, or less where the cache cannot hold a tile for each warp of it.
    num_blocks = std::min<int64_t>(resident_blocks,
                                   ceil_divide(num_items * capacity_tiles * launch.columns_per_block, launch.warps_per_block));
    prepare_even_cut(launch, num_items, static_cast<int>(num_blocks));
  }
  require(num_blocks <= INT32_MAX && num_items <= INT32_MAX, kDecode,
          ": batch_size * num_kv_heads * num_splits must be below 2^31, got ", num_blocks);
  launch.num_units = launch.num_blocks = static_cast<int>(num_blocks);
  launch.num_shared_units = launch.split == WorkSplit::kFixedParts && launch.max_parts == 1 ? 0 : launch.num_units;
  return launch;
}

namespace {

const DecodeKernel& choose_kernel(const DecodeParams& p, const Execution& execution,
                                  std::span<const DecodeKernel* const> candidates) {
  const std::string_view forced = variant_from_environment(execution, kDecode, kDecodeVariants);
  const std::string_view wanted = forced.empty() ? preferred_variant(p.q_dtype) : forced;
  for (const DecodeKernel* candidate : candidates)
    if (candidate->variant == wanted) return *candidate;
  return *candidates.front();  // the call itself forced the other variant
}

}  // namespace

std::span<const DecodeKernel> decode_kernels() {
  static const std::vector<DecodeKernel> kernels = [] {
    std::vector<DecodeKernel> rows;
    for (const PairKernels* pair : all_pairs())
      for (std::string_view variant : {kTensorCores, kCudaCores}) {
        const auto instances = variant == kTensorCores ? pair->tensor_cores : pair->cuda_cores;
        rows.push_back({"cuda", variant, pair->format, 8, instances.back().head_dim, 8, &has_usable_device, &run_decode});
      }
    return rows;
  }();
  return kernels;
}

DecodePlan plan_decode(const DecodeParams& params, const Execution& execution,
                       std::span<const DecodeKernel* const> candidates) {
  DecodePlan plan;
  plan.kernel = &choose_kernel(params, execution, candidates);
  plan.backend = "cuda";
  plan.variant = plan.kernel->variant;
  if (params.batch_size == 0) return plan;
  const DecodeLaunch launch = plan_launch(params, execution, plan.variant);
  plan.num_splits = launch.split == WorkSplit::kFixedParts ? launch.max_parts : launch.num_blocks;
  plan.split_size = params.batch_invariant ? kInvariantPartTiles * kTileTokens : 0;
  plan.workspace_bytes = workspace_bytes(launch);
  plan.counter_bytes = counter_bytes(launch);
  return plan;
}

void run_decode(const DecodeParams& params, const Execution& execution, const DecodePlan& plan, Workspace workspace) {
  const DecodeLaunch launch = plan_launch(params, execution, plan.variant);
  run(launch, make_task(params, launch, workspace), execution, kDecode);
}

}  // namespace quantattn::cuda
