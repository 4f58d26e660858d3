#pragma once

#include <span>

#include "decode/instances.h"

// Tuning as data. A change here needs a measurement.
namespace quantattn::cuda {

// Bytes of K and V that one warp keeps in flight or in use, and bounds on the stages that this is cut into.
inline constexpr int kStageBudgetBytes = 16 * 1024, kMinStages = 3, kMaxStages = 6;
constexpr int num_stages(int stage_bytes) {
  const int stages = kStageBudgetBytes / stage_bytes;
  return stages < kMinStages ? kMinStages : stages > kMaxStages ? kMaxStages : stages;
}

// Blocks that a multiprocessor should hold at once: the compiler bounds the registers so that they fit. The bounds are the
// highest at which tools/kernel_resources.py finds no spill.
constexpr int min_blocks_tensor_cores(int head_dim, int columns) {
  const int pressure = columns * (head_dim / 4 + 8);  // accumulators of a thread, and its scores, references and weights
  return pressure <= 56 ? 4 : pressure <= 88 ? 3 : 2;
}
constexpr int min_blocks_cuda_cores(int head_dim, int rows) { return head_dim * rows <= 128 || head_dim <= 64 ? 4 : 3; }

// Parts of an item in batch-invariant mode: at least 512 keys each and at most 32, so that a part keeps a block busy and the
// workspace stays small.
inline constexpr int kInvariantPartTiles = 512 / kTileTokens, kInvariantMaxParts = 32;

// float32 queries keep float32 accuracy on CUDA cores; everything else is faster on tensor cores.
constexpr std::string_view preferred_variant(const DecodeParams& params) {
  return params.q_dtype == DType::kFloat32 ? kCudaCores : kTensorCores;
}

// The lowest row tile that holds all rows, else the highest there is.
constexpr const DecodeInstance* choose_instance(std::span<const DecodeInstance> instances, int head_dim, int num_rows) {
  const DecodeInstance* chosen = nullptr;
  for (const DecodeInstance& candidate : instances) {
    if (candidate.head_dim < head_dim || (chosen != nullptr && candidate.head_dim > chosen->head_dim)) continue;
    if (chosen == nullptr || chosen->rows < num_rows) chosen = &candidate;
  }
  return chosen;
}

}  // namespace quantattn::cuda
