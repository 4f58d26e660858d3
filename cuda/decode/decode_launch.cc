#include "decode/decode_launch.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

#include "addresses.h"
#include "core/fail.h"
#include "decode/policy.h"
#include "device.h"
#include "launch.h"

namespace quantattn::cuda {
namespace {

Residency find_residency(const DecodeInstance& instance, const void* entry, int device, std::string_view who) {
  const int most_bytes = device_limits(device, who).shared_bytes_per_block;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, entry), who, "reading the decoding kernel");
  const int available = most_bytes - static_cast<int>(attributes.sharedSizeBytes);
  Residency found = {instance.max_warps, 0};
  while (found.warps_per_block > 0 && found.warps_per_block * instance.bytes_per_warp > available) found.warps_per_block /= 2;
  const int bytes = found.warps_per_block * instance.bytes_per_warp;
  if (found.warps_per_block == 0)
    fail<Unsupported>(who, ": a warp of the kernel must fit the GPU's ", most_bytes, " bytes of shared memory, got ",
                      instance.bytes_per_warp);
  check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), who, "preparing the decoding kernel");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found.blocks_per_multiprocessor, entry, 32 * found.warps_per_block,
                                                      static_cast<size_t>(bytes)),
        who, "reading the occupancy of the decoding kernel");
  return found;
}

// Workspace: pieces of warps, then pieces of units.
int64_t num_warp_pieces(const DecodeLaunch& launch) { return 2 * int64_t{launch.num_blocks} * launch.warps_per_block; }
int pieces_per_unit(const DecodeLaunch& launch) { return launch.split == WorkSplit::kEqualRanges ? 2 : 1; }
int64_t num_unit_pieces(const DecodeLaunch& launch) {
  return int64_t{launch.num_shared_units} * pieces_per_unit(launch) * launch.columns_per_block;
}
int64_t floats_per_piece(const DecodeLaunch& launch) { return piece_floats(launch.instance->rows, launch.instance->head_dim); }

}  // namespace

Residency residency(const DecodeInstance& instance, int device, std::string_view who) {
  static std::mutex mutex;
  static std::unordered_map<const DecodeInstance*, Residency> known[64];
  const std::scoped_lock lock(mutex);
  auto& of_device = known[device & 63];
  const auto found = of_device.find(&instance);
  if (found != of_device.end()) return found->second;
  const DeviceScope scope(device, who);
  const Residency uniform = find_residency(instance, reinterpret_cast<const void*>(instance.entry), device, who),
                  ragged = find_residency(instance, reinterpret_cast<const void*>(instance.ragged_entry), device, who);
  const Residency both = {std::min(uniform.warps_per_block, ragged.warps_per_block),
                          std::min(uniform.blocks_per_multiprocessor, ragged.blocks_per_multiprocessor)};
  return of_device.emplace(&instance, both).first->second;
}

int set_instance(DecodeLaunch& launch, const DecodeInstance& instance, const Execution& execution, std::string_view who) {
  const Residency resident = residency(instance, execution.device.index, who);
  launch.instance = &instance;
  launch.warps_per_block = resident.warps_per_block;
  return device_limits(execution.device.index, who).num_multiprocessors * resident.blocks_per_multiprocessor;
}

void prepare_even_cut(DecodeLaunch& launch, int64_t num_items, int num_blocks) {
  launch.even_units = choose_even_units(num_items, num_blocks);
  launch.max_parts = static_cast<int>(launch.even_units / num_items);
  launch.min_part_tiles = launch.warps_per_block / launch.columns_per_block;
}

int64_t workspace_bytes(const DecodeLaunch& launch) {
  return (num_warp_pieces(launch) + num_unit_pieces(launch)) * floats_per_piece(launch) * int64_t{sizeof(float)};
}

int64_t counter_bytes(const DecodeLaunch& launch) { return int64_t{launch.num_shared_units} * int64_t{sizeof(uint32_t)}; }

DecodeTask make_task(const DecodeParams& p, const DecodeLaunch& launch, Workspace workspace) {
  DecodeTask task = {};
  task.params = p;
  task.causal = true;
  task.page_size = FastDivide(static_cast<uint32_t>(p.cache.page_size));
  task.capacity = static_cast<int>(int64_t{p.max_pages} * p.cache.page_size);
  task.group_size = FastDivide(static_cast<uint32_t>(p.num_q_heads / p.cache.num_kv_heads));
  task.num_rows = launch.num_rows;
  task.columns_divisor = FastDivide(static_cast<uint32_t>(launch.columns_divisor));
  task.rows_log2 = std::countr_zero(static_cast<unsigned>(launch.instance->rows));
  task.columns_log2 = std::countr_zero(static_cast<unsigned>(launch.columns_per_block));
  task.warps_per_column = launch.warps_per_block / launch.columns_per_block;
  task.items_per_sequence = FastDivide(static_cast<uint32_t>(launch.items_per_sequence));
  task.k = code_addresses(p.cache.k_codes, p.cache.format.k, p.cache.head_dim);
  task.v = code_addresses(p.cache.v_codes, p.cache.format.v, p.cache.head_dim);
  task.is_tile_in_page = !p.page_table || p.cache.page_size % kTileTokens == 0;
  const int out_bytes = p.q_dtype == DType::kFloat32 ? 4 : 2;
  task.can_store_quads = all_multiples(p.out, out_bytes, p.cache.head_dim, 4 * out_bytes);
  task.can_copy_query = p.q_dtype != DType::kFloat32 && all_multiples(p.q, 2, p.cache.head_dim, 16);
  task.has_token_scales = p.cache.k_scale.granularity == ScaleGranularity::kTokenHead ||
                          p.cache.v_scale.granularity == ScaleGranularity::kTokenHead;
  task.split = launch.split;
  task.even_units = static_cast<unsigned>(launch.even_units);
  task.max_parts = FastDivide(static_cast<uint32_t>(launch.max_parts));
  task.min_part_tiles = FastDivide(static_cast<uint32_t>(launch.min_part_tiles));
  task.max_units = static_cast<unsigned>(launch.num_units);
  task.warp_pieces = static_cast<float*>(workspace.scratch);
  task.unit_pieces = task.warp_pieces + num_warp_pieces(launch) * floats_per_piece(launch);
  task.pieces_per_unit = pieces_per_unit(launch);
  task.counters = static_cast<uint32_t*>(workspace.counters);
  return task;
}

void run(const DecodeLaunch& launch, const DecodeTask& task, const Execution& execution, std::string_view who) {
  const dim3 num_blocks(static_cast<unsigned>(launch.num_blocks));
  const int num_threads = 32 * launch.warps_per_block, shared_bytes = launch.warps_per_block * launch.instance->bytes_per_warp;
  constexpr std::string_view kWhat = "launching the decoding kernel";
  if (task.cu_seqlens_q)
    launch_dependent(launch.instance->ragged_entry, num_blocks, num_threads, shared_bytes, execution, RaggedTask(task), who,
                     kWhat);
  else
    launch_dependent(launch.instance->entry, num_blocks, num_threads, shared_bytes, execution, UniformTask(task), who, kWhat);
}

const PairKernels& kernels_of(KvPair format) {
  const auto pairs = all_pairs();
  return **std::find_if(pairs.begin(), pairs.end(), [&](const PairKernels* pair) { return pair->format == format; });
}

std::string_view variant_from_environment(const Execution& execution, std::string_view who,
                                          std::initializer_list<std::string_view> variants) {
  const char* text = execution.kernel.empty() ? std::getenv("QUANTATTN_CUDA_KERNEL") : nullptr;
  const std::string_view wanted = text == nullptr ? std::string_view{} : text;
  if (!wanted.empty() && wanted != kTensorCores && wanted != kCudaCores && wanted != kHopper)
    fail<Unsupported>(who, ": QUANTATTN_CUDA_KERNEL must be ", kTensorCores, ", ", kCudaCores, " or ", kHopper, ", got ",
                      wanted);
  return std::find(variants.begin(), variants.end(), wanted) == variants.end() ? std::string_view{} : wanted;
}

}  // namespace quantattn::cuda
