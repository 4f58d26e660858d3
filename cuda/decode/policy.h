#pragma once

#include <span>

#include "decode/instances.h"

// Tuning as data. A change here needs a measurement.
namespace quantattn::cuda {

// Warps of a block; a multiprocessor holds one block. A power of two lets them share out columns. `register_warps`: as many
// as the registers allow. Shared memory is that of data-centre GPUs from sm_80 on less a reserve; on others a block has fewer
// warps.
constexpr int block_warps(int register_warps, int bytes_per_warp) {
  constexpr int kSharedBytes = 224 * 1024;
  int warps = register_warps;
  while (warps > 1 && warps * bytes_per_warp > kSharedBytes) warps /= 2;
  return warps;
}

// The highest bounds at which tools/kernel_resources.py finds no spill.
constexpr int register_warps_tensor_cores(int head_dim, int columns) {
  const int pressure = columns * (head_dim / 4 + 8);  // accumulators of a thread, and its scores, bases and weights
  return pressure <= 56 ? 16 : 8;
}
constexpr int register_warps_cuda_cores(int head_dim, int rows) { return head_dim * rows <= 128 || head_dim <= 64 ? 16 : 8; }

// Columns that a block takes side by side: as many as divide the columns of a sequence and the warps, while the last block to
// arrive at an item has at most this much to read; less where a lone sequence has nothing else under way. H100, int8: 32/8
// heads 64 x 4k takes 199 us at 4 columns and 204 us at 8; 64/8 heads 32 x 8k takes 199 us at 2 and 202 us at 4; 32/32 heads
// 16 x 4k takes 201 us at 16 and 206 us at 8; 32/32 heads 1 x 4k takes 20.8 us at 2 and 21.4 us at 4.
inline constexpr int64_t kMergeBytes = 40 * 1024, kLoneMergeBytes = 24 * 1024;
// Where columns have no more tiles than a block has warps: only as many as it takes for a block to have one item at most. H100,
// int8, 32/8 heads: 8 x 256 takes 9.4 us at 1 column and 11.5 us at 2; 32 x 256 takes 13.6 us at 2 and 15.4 us at 4.
constexpr int choose_columns(int64_t num_columns, int batch_size, int64_t capacity_tiles, int num_warps, int num_blocks,
                             int64_t row_bytes) {
  const int64_t most_bytes = batch_size == 1 ? kLoneMergeBytes : kMergeBytes;
  const bool is_short = capacity_tiles <= num_warps;
  int chosen = 1;
  for (int columns = 2; columns <= num_warps; columns *= 2) {
    if (is_short && batch_size * num_columns <= int64_t{chosen} * num_blocks) break;
    const int64_t blocks_per_item = 1 + int64_t{num_blocks} * columns / (batch_size * num_columns);
    if (num_columns % columns != 0 || num_warps % columns != 0) break;
    if (blocks_per_item > 2 && blocks_per_item * columns * row_bytes > most_bytes) break;
    chosen = columns;
  }
  return chosen;
}

// Blocks that share items of equal length, each with equally many items or parts of one: nobody has a piece of an item that
// it did not begin with, and few items have to be joined. 0 where that leaves more than a tenth of the blocks idle: memory is
// the limit, not blocks. H100, int8, 128 blocks of 132: 32/8 heads 64 x 4k takes 194 us and 205 us without, 256 x 1k 195 and
// 215; 32/1 heads 32 x 8k 52 and 65.
constexpr int choose_even_units(int64_t num_items, int num_blocks) {
  for (int units = num_blocks; units > 0 && 10 * units >= 9 * num_blocks; --units)
    if (units % num_items == 0 || num_items % units == 0) return units;
  return 0;
}

// Parts of an item in batch-invariant mode: at least 1024 keys each and at most 32, so that a part keeps a block busy and the
// workspace stays small. Columns side by side where the cut must not depend on the batch.
inline constexpr int kInvariantPartTiles = 1024 / kTileTokens, kInvariantMaxParts = 32, kFixedColumns = 2;

// float32 queries keep float32 accuracy on CUDA cores; everything else is faster on tensor cores.
constexpr std::string_view preferred_variant(DType q_dtype) { return q_dtype == DType::kFloat32 ? kCudaCores : kTensorCores; }

// So few warps cannot keep the memory busy: two columns of lower row tiles are better, though K and V are read twice.
// H100, float16, 32/1 heads 32 x 8k: 73 us with four warps of 32 rows, 62 us with eight of 16.
inline constexpr int kFewWarps = 4;

// The lowest row tile that holds all rows, else the highest there is.
constexpr const DecodeInstance& choose_instance(const PairKernels& pair, std::string_view variant, int head_dim,
                                                int64_t num_rows) {
  const DecodeInstance* chosen = nullptr;
  for (const DecodeInstance& candidate : variant == kTensorCores ? pair.tensor_cores : pair.cuda_cores) {
    if (candidate.head_dim < head_dim || (chosen != nullptr && candidate.head_dim > chosen->head_dim)) continue;
    const bool do_two_columns =
        chosen != nullptr && num_rows <= 2 * chosen->rows && candidate.max_warps <= kFewWarps && chosen->max_warps > kFewWarps;
    if (chosen == nullptr || (chosen->rows < num_rows && !do_two_columns)) chosen = &candidate;
  }
  return *chosen;
}

}  // namespace quantattn::cuda
