// Host side of decode_attention: which kernel, which grid, how much workspace. Reads host values only.
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "addresses.h"
#include "core/fail.h"
#include "decode/policy.h"
#include "device.h"
#include "launch.h"

namespace quantattn::cuda {
namespace {

constexpr std::string_view kDecode = "decode_attention";

// How many blocks of an instance a multiprocessor holds, and how many warps a block has.
struct Residency {
  int warps_per_block, blocks_per_multiprocessor;
};

Residency find_residency(const DecodeInstance& instance, int device) {
  const int most_bytes = device_limits(device, kDecode).shared_bytes_per_block;
  const void* entry = reinterpret_cast<const void*>(instance.entry);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, entry), kDecode, "reading the decoding kernel");
  const int available = most_bytes - static_cast<int>(attributes.sharedSizeBytes);
  Residency found = {instance.max_warps, 0};
  while (found.warps_per_block > 0 && found.warps_per_block * instance.bytes_per_warp > available) found.warps_per_block /= 2;
  const int bytes = found.warps_per_block * instance.bytes_per_warp;
  if (found.warps_per_block == 0)
    fail<Unsupported>(kDecode, ": a warp of the kernel must fit the GPU's ", most_bytes, " bytes of shared memory, got ",
                      instance.bytes_per_warp);
  check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), kDecode,
        "preparing the decoding kernel");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found.blocks_per_multiprocessor, entry, 32 * found.warps_per_block,
                                                      static_cast<size_t>(bytes)),
        kDecode, "reading the occupancy of the decoding kernel");
  return found;
}

Residency residency(const DecodeInstance& instance, int device) {
  static std::mutex mutex;
  static std::unordered_map<const DecodeInstance*, Residency> known[64];
  const std::scoped_lock lock(mutex);
  auto& of_device = known[device & 63];
  const auto found = of_device.find(&instance);
  if (found != of_device.end()) return found->second;
  const DeviceScope scope(device, kDecode);
  return of_device.emplace(&instance, find_residency(instance, device)).first->second;
}

struct Launch {
  const DecodeInstance* instance;
  int num_rows, num_row_tiles, columns_per_block, items_per_sequence, num_items;
  WorkSplit split;
  int max_parts, min_part_tiles;
  int num_blocks, warps_per_block;
};

int64_t ceil_divide(int64_t n, int64_t d) { return (n + d - 1) / d; }

Launch plan_launch(const DecodeParams& p, const Execution& execution, const DecodeKernel& kernel) {
  Launch launch = {};
  launch.num_rows = p.num_q_tokens * (p.num_q_heads / p.cache.num_kv_heads);
  for (const PairKernels* pair : all_pairs())
    if (pair->format == p.cache.format)
      launch.instance = choose_instance(kernel.variant == kTensorCores ? pair->tensor_cores : pair->cuda_cores,
                                        p.cache.head_dim, launch.num_rows);
  const Residency resident = residency(*launch.instance, execution.device.index);
  launch.warps_per_block = resident.warps_per_block;
  launch.num_row_tiles = static_cast<int>(ceil_divide(launch.num_rows, launch.instance->rows));
  const int resident_blocks =
      device_limits(execution.device.index, kDecode).num_multiprocessors * resident.blocks_per_multiprocessor;
  const int num_columns = p.cache.num_kv_heads * launch.num_row_tiles;
  const int64_t row_bytes = std::min(launch.num_rows, launch.instance->rows) * int64_t{4} * launch.instance->head_dim;
  const int64_t capacity_tiles = std::max<int64_t>(1, ceil_divide(int64_t{p.max_pages} * p.cache.page_size, kTileTokens));
  // Tiles of a whole batch are numbered in 31 bits.
  const bool is_fixed =
      p.num_splits > 0 || p.batch_invariant || int64_t{p.batch_size} * num_columns * capacity_tiles > INT32_MAX;
  launch.columns_per_block =
      is_fixed ? (num_columns % kFixedColumns == 0 && launch.warps_per_block % kFixedColumns == 0 ? kFixedColumns : 1)
               : choose_columns(num_columns, p.batch_size, launch.warps_per_block, resident_blocks, row_bytes);
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
  }
  require(num_blocks <= INT32_MAX && num_items <= INT32_MAX, kDecode,
          ": batch_size * num_kv_heads * num_splits must be below 2^31, got ", num_blocks);
  launch.num_items = static_cast<int>(num_items);
  launch.num_blocks = static_cast<int>(num_blocks);
  return launch;
}

// Workspace: pieces of warps, then pieces of blocks.
int64_t num_warp_pieces(const Launch& launch) { return 2 * int64_t{launch.num_blocks} * launch.warps_per_block; }
int64_t num_block_pieces(const Launch& launch) { return 2 * int64_t{launch.num_blocks} * launch.columns_per_block; }
int64_t floats_per_piece(const Launch& launch) { return piece_floats(launch.instance->rows, launch.instance->head_dim); }

DecodeTask make_task(const DecodeParams& p, const Launch& launch, Workspace workspace) {
  DecodeTask task = {};
  task.params = p;
  task.page_size = FastDivide(static_cast<uint32_t>(p.cache.page_size));
  task.capacity = static_cast<int>(int64_t{p.max_pages} * p.cache.page_size);
  task.group_size = FastDivide(static_cast<uint32_t>(p.num_q_heads / p.cache.num_kv_heads));
  task.num_rows = launch.num_rows;
  task.num_row_tiles = FastDivide(static_cast<uint32_t>(launch.num_row_tiles));
  task.columns_log2 = std::countr_zero(static_cast<unsigned>(launch.columns_per_block));
  task.warps_per_column = launch.warps_per_block / launch.columns_per_block;
  task.items_per_sequence = launch.items_per_sequence;
  task.k = code_addresses(p.cache.k_codes, p.cache.format.k, p.cache.head_dim);
  task.v = code_addresses(p.cache.v_codes, p.cache.format.v, p.cache.head_dim);
  task.is_tile_in_page = !p.page_table || p.cache.page_size % kTileTokens == 0;
  const int out_bytes = p.q_dtype == DType::kFloat32 ? 4 : 2;
  task.can_store_quads = all_multiples(p.out, out_bytes, p.cache.head_dim, 4 * out_bytes);
  task.can_copy_query = p.q_dtype != DType::kFloat32 && all_multiples(p.q, 2, p.cache.head_dim, 16);
  task.has_token_scales = p.cache.k_scale.granularity == ScaleGranularity::kTokenHead ||
                          p.cache.v_scale.granularity == ScaleGranularity::kTokenHead;
  task.split = launch.split;
  task.max_parts = launch.max_parts;
  task.min_part_tiles = launch.min_part_tiles;
  task.warp_pieces = static_cast<float*>(workspace.scratch);
  task.block_pieces = task.warp_pieces + num_warp_pieces(launch) * floats_per_piece(launch);
  task.counters = static_cast<uint32_t*>(workspace.counters);
  return task;
}

// The variant that the environment asks for, where the call does not.
std::string_view variant_from_environment(const Execution& execution) {
  const char* text = execution.kernel.empty() ? std::getenv("QUANTATTN_CUDA_KERNEL") : nullptr;
  const std::string_view variant = text == nullptr ? std::string_view{} : text;
  if (!variant.empty() && variant != kTensorCores && variant != kCudaCores)
    fail<Unsupported>(kDecode, ": QUANTATTN_CUDA_KERNEL must be ", kTensorCores, " or ", kCudaCores, ", got ", variant);
  return variant;
}

const DecodeKernel& choose_kernel(const DecodeParams& p, const Execution& execution,
                                  std::span<const DecodeKernel* const> candidates) {
  const std::string_view forced = variant_from_environment(execution);
  const std::string_view wanted = forced.empty() ? preferred_variant(p) : forced;
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
  const Launch launch = plan_launch(params, execution, *plan.kernel);
  plan.num_splits = launch.split == WorkSplit::kFixedParts ? launch.max_parts : launch.num_blocks;
  plan.split_size = params.batch_invariant ? kInvariantPartTiles * kTileTokens : 0;
  plan.workspace_bytes =
      (num_warp_pieces(launch) + num_block_pieces(launch)) * floats_per_piece(launch) * int64_t{sizeof(float)};
  plan.counter_bytes =
      int64_t{launch.split == WorkSplit::kEqualRanges ? launch.num_blocks : launch.num_items} * int64_t{sizeof(uint32_t)};
  return plan;
}

void run_decode(const DecodeParams& params, const Execution& execution, const DecodePlan& plan, Workspace workspace) {
  const Launch launch = plan_launch(params, execution, *plan.kernel);
  const DecodeTask task = make_task(params, launch, workspace);
  launch_dependent(launch.instance->entry, dim3(static_cast<unsigned>(launch.num_blocks)), 32 * launch.warps_per_block,
                   launch.warps_per_block * launch.instance->bytes_per_warp, execution, task, kDecode,
                   plan.variant == kTensorCores ? "launching the tensor_cores kernel" : "launching the cuda_cores kernel");
}

}  // namespace quantattn::cuda
