#pragma once

#include "decode/task.h"

// The plan that other libraries make on the host, made by every warp for itself from seq_lens: which tiles are mine, and
// which blocks share my items. Reads lengths only, so it is right on every replay of a captured graph.
namespace quantattn::cuda {

__device__ __forceinline__ int ceil_divide(int n, int d) { return (n + d - 1) / d; }

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
  span.num_tiles = max(1, ceil_divide(span.end_key, kTileTokens) - span.first_tile);
  return span;
}

// An item, where its tiles lie in the numbering of all tiles (kEqualRanges) or of its own (kFixedParts), and one of its
// columns.
struct Item {
  int64_t first_tile;
  int num_tiles;
  int sequence, index;  // of the item in its sequence
  int kv_head, row_tile;

  __device__ __forceinline__ void set_column(const DecodeTask& task, int column_in_item) {
    const int column = index * task.columns_per_block + column_in_item;
    kv_head = column / task.num_row_tiles;
    row_tile = column - kv_head * task.num_row_tiles;
  }
  __device__ bool is_same_item(const Item& other) const { return sequence == other.sequence && index == other.index; }
};

__device__ __forceinline__ int own_column(const DecodeTask& task) {
  return static_cast<int>(threadIdx.x / 32) % task.columns_per_block;
}

// A half-open range of tile numbers.
struct TileRange {
  int64_t begin, end;
  __device__ int64_t size() const { return end - begin; }
  // Part `index` of `count` equal parts.
  __device__ TileRange part(int index, int count) const {
    return {begin + size() * index / count, begin + size() * (index + 1) / count};
  }
};

// The part, of `count` equal parts of [0, total), that holds `tile`.
__device__ __forceinline__ int part_holding(int64_t tile, int64_t total, int count) {
  return static_cast<int>(((tile + 1) * count + total - 1) / total) - 1;
}

// What one warp of one block does. The tiles [0, total_tiles) are cut into num_parts equal parts, one for each block from
// `first_block` on, and a part into ranges for
// its warps: one for each set of warps that covers the columns.
struct WorkPlan {
  int64_t total_tiles;
  int num_parts, first_block;
  TileRange block_range, warp_range;  // empty for a block beyond the last part
  Item first_item;                    // holds warp_range.begin, where warp_range is not empty

  __device__ __forceinline__ void cut(const DecodeTask& task, int part) {
    const TileRange all = {0, total_tiles};
    block_range = part < num_parts ? all.part(part, num_parts) : TileRange{0, 0};
    warp_range = block_range.part(static_cast<int>(threadIdx.x / 32) / task.columns_per_block,
                                  static_cast<int>(blockDim.x / 32) / task.columns_per_block);
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
  return sequence < task.params.batch_size ? span_of(task, sequence).num_tiles : 0;
}

// Finds the item that holds plan.warp_range.begin; `own_tiles` are those of sequence `lane`.
__device__ __forceinline__ void find_first_item(const DecodeTask& task, WorkPlan& plan, unsigned own_tiles, int lane) {
  const int per_sequence = task.items_per_sequence;
  int64_t before = 0;  // tiles of one item of each sequence before `b`
  for (int b = 0; b < task.params.batch_size; b += 32) {
    const unsigned tiles = b == 0 ? own_tiles : lane_tiles(task, b + lane);
    const int64_t scan = before + warp_inclusive_scan(tiles, lane);
    const unsigned reaching = __ballot_sync(0xFFFFFFFFu, scan * per_sequence > plan.warp_range.begin);
    if (reaching != 0) {
      const int source = __ffs(static_cast<int>(reaching)) - 1;
      Item& item = plan.first_item;
      item.sequence = b + source;
      item.num_tiles = static_cast<int>(__shfl_sync(0xFFFFFFFFu, tiles, source));
      const int64_t sequence_begin = (__shfl_sync(0xFFFFFFFFu, scan, source) - item.num_tiles) * per_sequence;
      item.index = static_cast<int>((plan.warp_range.begin - sequence_begin) / item.num_tiles);
      item.first_tile = sequence_begin + static_cast<int64_t>(item.index) * item.num_tiles;
      item.set_column(task, own_column(task));
      return;
    }
    before = __shfl_sync(0xFFFFFFFFu, scan, 31);
  }
}

__device__ inline WorkPlan plan_equal_ranges(const DecodeTask& task, int lane) {
  const unsigned own_tiles = lane_tiles(task, lane);
  int64_t sum = warp_sum(own_tiles);
  for (int b = 32; b < task.params.batch_size; b += 32) sum += warp_sum(lane_tiles(task, b + lane));
  WorkPlan plan;
  plan.total_tiles = sum * task.items_per_sequence;
  plan.num_parts = static_cast<int>(min(plan.total_tiles, static_cast<int64_t>(gridDim.x)));
  plan.first_block = 0;
  plan.cut(task, static_cast<int>(blockIdx.x));
  if (plan.warp_range.size() > 0) find_first_item(task, plan, own_tiles, lane);
  return plan;
}

__device__ inline WorkPlan plan_fixed_parts(const DecodeTask& task) {
  const int index = static_cast<int>(blockIdx.x) / task.max_parts;
  WorkPlan plan;
  Item& item = plan.first_item;
  item.sequence = index / task.items_per_sequence;
  item.index = index - item.sequence * task.items_per_sequence;
  item.set_column(task, own_column(task));
  item.first_tile = 0;
  item.num_tiles = span_of(task, item.sequence).num_tiles;
  plan.total_tiles = item.num_tiles;
  plan.num_parts = min(task.max_parts, ceil_divide(item.num_tiles, task.min_part_tiles));
  plan.first_block = index * task.max_parts;
  plan.cut(task, static_cast<int>(blockIdx.x) - plan.first_block);
  return plan;
}

}  // namespace quantattn::cuda
