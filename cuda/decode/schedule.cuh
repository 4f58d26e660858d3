#pragma once

#include "decode/task.h"

// The plan that other libraries make on the host, made by every warp for itself from seq_lens: which tiles are mine, and
// which blocks share my items. Reads lengths only, so it is right on every replay of a captured graph.
namespace quantattn::cuda {

// Measured on an H100: 64/8 heads, 1 x 8k, takes 22 us where 16 warps share 31 tiles and 20 us where 8 do.
inline constexpr unsigned kMinTilesPerWarp = 4;

// The keys that some query token of a sequence sees, and the tiles that cover them.
struct SequenceSpan {
  int first_key, end_key;     // [first_key, end_key), empty where end_key <= first_key
  int first_tile, num_tiles;  // num_tiles >= 1
  int length;
};

__device__ __forceinline__ SequenceSpan span_of(const DecodeTask& task, int sequence) {
  const DecodeParams& p = task.params;
  SequenceSpan span;
  span.length = min(max(p.seq_lens[sequence], 0), task.capacity);
  int first = p.seq_starts ? max(p.seq_starts[sequence], 0) : 0;
  if (p.sliding_window > 0) first = max(first, span.length - p.num_q_tokens + 1 - p.sliding_window);
  span.first_key = min(first, span.length);
  span.end_key = span.length;
  span.first_tile = span.first_key / kTileTokens;
  span.num_tiles = max(1, (span.end_key + kTileTokens - 1) / kTileTokens - span.first_tile);
  return span;
}

__device__ __forceinline__ int columns_per_block(const DecodeTask& task) { return 1 << task.columns_log2; }
__device__ __forceinline__ int own_column(const DecodeTask& task) {
  return static_cast<int>(threadIdx.x / 32) & (columns_per_block(task) - 1);
}

// An item, where its tiles lie in the numbering of all tiles (kEqualRanges) or of its own (kFixedParts), and one of its
// columns.
struct Item {
  unsigned first_tile;
  int num_tiles;
  int sequence, index;  // of the item in its sequence
  int kv_head, row_tile;

  __device__ __forceinline__ void set_column(const DecodeTask& task, int column_in_item) {
    const unsigned column = static_cast<unsigned>((index << task.columns_log2) + column_in_item);
    const unsigned head = task.num_row_tiles.quotient(column);
    kv_head = static_cast<int>(head);
    row_tile = static_cast<int>(column - head * task.num_row_tiles.divisor);
  }
  __device__ __forceinline__ bool is_same_item(const Item& other) const {
    return sequence == other.sequence && index == other.index;
  }
};

// A half-open range of tile numbers.
struct TileRange {
  unsigned begin, end;
  __device__ __forceinline__ unsigned size() const { return end - begin; }
};

// [0, total) cut into `count` parts that differ by at most one; the longer ones come first.
struct EqualParts {
  unsigned quotient, remainder;

  __device__ __forceinline__ EqualParts(unsigned total, unsigned count)
      : quotient(total / count), remainder(total - quotient * count) {}
  __device__ __forceinline__ unsigned begin(unsigned part) const { return quotient * part + min(part, remainder); }
  __device__ __forceinline__ TileRange range(unsigned part) const { return {begin(part), begin(part + 1)}; }
  __device__ __forceinline__ unsigned holding(unsigned tile) const {
    const unsigned longer = remainder * (quotient + 1);
    return tile < longer ? tile / (quotient + 1) : remainder + (tile - longer) / quotient;
  }
};

// What one warp of one block does. All tiles are cut into num_parts parts, one for each block from `first_block` on, and a
// part into ranges for its warps: one for each set of warps that covers the columns.
struct WorkPlan {
  unsigned num_parts, first_block;
  EqualParts parts;
  TileRange block_range, warp_range;  // empty for a block beyond the last part
  Item first_item;                    // holds warp_range.begin, where warp_range is not empty

  __device__ __forceinline__ WorkPlan(const DecodeTask& task, unsigned total_tiles, unsigned count, unsigned first)
      : num_parts(count), first_block(first), parts(total_tiles, count), block_range{0, 0}, first_item{} {
    const unsigned part = blockIdx.x - first_block;
    if (part < num_parts) block_range = parts.range(part);
    // Short parts leave warps idle: joining a piece costs as much as a few tiles.
    const unsigned set = threadIdx.x / 32 >> task.columns_log2, size = block_range.size();
    const unsigned num_sets = min(static_cast<unsigned>(task.warps_per_column), max(1u, size / kMinTilesPerWarp));
    warp_range = set < num_sets ? EqualParts(size, num_sets).range(set) : TileRange{0, 0};
    warp_range.begin += block_range.begin;
    warp_range.end += block_range.begin;
  }
};

__device__ __forceinline__ unsigned warp_sum(unsigned x) { return __reduce_add_sync(0xFFFFFFFFu, x); }

__device__ __forceinline__ unsigned warp_inclusive_scan(unsigned x, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned below = __shfl_up_sync(0xFFFFFFFFu, x, distance);
    if (lane >= distance) x += below;
  }
  return x;
}

// Tiles of one item of the sequence that this lane stands for.
__device__ __forceinline__ unsigned lane_tiles(const DecodeTask& task, int sequence) {
  return sequence < task.params.batch_size ? static_cast<unsigned>(span_of(task, sequence).num_tiles) : 0;
}

// Finds the item that holds plan.warp_range.begin. `tiles` are those of sequence `lane` at first.
__device__ __forceinline__ void find_first_item(const DecodeTask& task, WorkPlan& plan, unsigned tiles, int lane) {
  const unsigned per_sequence = static_cast<unsigned>(task.items_per_sequence);
  unsigned before = 0;  // tiles of one item of each sequence before `b`
#pragma unroll 1
  for (int b = 0; b < task.params.batch_size; b += 32) {
    if (b > 0) tiles = lane_tiles(task, b + lane);
    const unsigned scan = before + warp_inclusive_scan(tiles, lane);
    const unsigned reaching = __ballot_sync(0xFFFFFFFFu, scan * per_sequence > plan.warp_range.begin);
    if (reaching != 0) {
      const int source = __ffs(static_cast<int>(reaching)) - 1;
      Item& item = plan.first_item;
      const unsigned num_tiles = __shfl_sync(0xFFFFFFFFu, tiles, source);
      const unsigned sequence_begin = (__shfl_sync(0xFFFFFFFFu, scan, source) - num_tiles) * per_sequence;
      const unsigned index = (plan.warp_range.begin - sequence_begin) / num_tiles;
      item.sequence = b + source;
      item.num_tiles = static_cast<int>(num_tiles);
      item.index = static_cast<int>(index);
      item.first_tile = sequence_begin + index * num_tiles;
      item.set_column(task, own_column(task));
      return;
    }
    before = __shfl_sync(0xFFFFFFFFu, scan, 31);
  }
}

__device__ __forceinline__ WorkPlan plan_equal_ranges(const DecodeTask& task, int lane) {
  const unsigned own_tiles = lane_tiles(task, lane);
  unsigned sum = warp_sum(own_tiles);
#pragma unroll 1
  for (int b = 32; b < task.params.batch_size; b += 32) sum += warp_sum(lane_tiles(task, b + lane));
  const unsigned total = sum * static_cast<unsigned>(task.items_per_sequence);
  WorkPlan plan(task, total, min(total, gridDim.x), 0);
  if (plan.warp_range.size() > 0) find_first_item(task, plan, own_tiles, lane);
  return plan;
}

__device__ __forceinline__ WorkPlan plan_fixed_parts(const DecodeTask& task) {
  const unsigned index = blockIdx.x / static_cast<unsigned>(task.max_parts);
  const int sequence = static_cast<int>(index) / task.items_per_sequence;
  const int num_tiles = span_of(task, sequence).num_tiles;
  const int num_parts = min(task.max_parts, (num_tiles + task.min_part_tiles - 1) / task.min_part_tiles);
  WorkPlan plan(task, static_cast<unsigned>(num_tiles), static_cast<unsigned>(num_parts),
                index * static_cast<unsigned>(task.max_parts));
  plan.first_item = {0, num_tiles, sequence, static_cast<int>(index) - sequence * task.items_per_sequence, 0, 0};
  plan.first_item.set_column(task, own_column(task));
  return plan;
}

}  // namespace quantattn::cuda
