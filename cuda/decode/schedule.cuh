#pragma once

#include "decode/task.h"

// The plan that other libraries make on the host, made by every block for itself from seq_lens: which tiles are mine, and
// which blocks share my items. Reads lengths only, so it is right on every replay of a captured graph.
namespace quantattn::cuda {

// Measured on an H100: 64/8 heads, 1 x 8k, takes 17.6 us where 16 warps share 32 tiles and 16.3 us where 8 do.
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
  int num_sets;  // sets of warps that have a range
  EqualParts parts;
  TileRange block_range, warp_range;  // empty for a block beyond the last part
  Item first_item;                    // holds warp_range.begin, where warp_range is not empty

  __device__ __forceinline__ WorkPlan(const DecodeTask& task, unsigned total_tiles, unsigned count, unsigned first)
      : num_parts(count), first_block(first), parts(total_tiles, count), block_range{0, 0}, first_item{} {
    const unsigned part = blockIdx.x - first_block;
    if (part < num_parts) block_range = parts.range(part);
    // Short parts leave warps idle: joining a piece costs as much as a few tiles.
    const unsigned set = threadIdx.x / 32 >> task.columns_log2, size = block_range.size();
    const unsigned busy_sets = min(static_cast<unsigned>(task.warps_per_column), max(1u, size / kMinTilesPerWarp));
    num_sets = static_cast<int>(busy_sets);
    warp_range = set < busy_sets ? EqualParts(size, busy_sets).range(set) : TileRange{0, 0};
    warp_range.begin += block_range.begin;
    warp_range.end += block_range.begin;
  }
};

__device__ __forceinline__ unsigned warp_inclusive_scan(unsigned x, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned below = __shfl_up_sync(0xFFFFFFFFu, x, distance);
    if (lane >= distance) x += below;
  }
  return x;
}

// Each thread of a block stands for equally many neighbouring sequences; here one item of each counts.
struct BatchNotes {
  unsigned scan[32 * kMaxWarpsPerBlock];  // tiles of a thread's sequences and of those of lower lanes
  unsigned warp_tiles[kMaxWarpsPerBlock];
};

// Finds the item that holds plan.warp_range.begin. Lane w knows the tiles up to the end of warp w's sequences.
__device__ __forceinline__ Item find_item(const DecodeTask& task, unsigned tile, const BatchNotes& notes, unsigned warp_scan,
                                          int sequences_per_thread, int lane) {
  const unsigned per_sequence = static_cast<unsigned>(task.items_per_sequence);
  const int warp = __ffs(static_cast<int>(__ballot_sync(0xFFFFFFFFu, warp_scan * per_sequence > tile))) - 1;
  unsigned before = __shfl_sync(0xFFFFFFFFu, warp_scan, warp) - notes.warp_tiles[warp];
  const unsigned scan = before + notes.scan[32 * warp + lane];
  const int thread = __ffs(static_cast<int>(__ballot_sync(0xFFFFFFFFu, scan * per_sequence > tile))) - 1;
  if (thread > 0) before = __shfl_sync(0xFFFFFFFFu, scan, thread - 1);
  Item item = {};
  item.sequence = (32 * warp + thread) * sequences_per_thread;
  item.num_tiles = span_of(task, item.sequence).num_tiles;
  while ((before + static_cast<unsigned>(item.num_tiles)) * per_sequence <= tile) {
    before += static_cast<unsigned>(item.num_tiles);
    item.num_tiles = span_of(task, ++item.sequence).num_tiles;
  }
  const unsigned index = (tile - before * per_sequence) / static_cast<unsigned>(item.num_tiles);
  item.index = static_cast<int>(index);
  item.first_tile = before * per_sequence + index * static_cast<unsigned>(item.num_tiles);
  item.set_column(task, own_column(task));
  return item;
}

__device__ __forceinline__ WorkPlan plan_equal_ranges(const DecodeTask& task, BatchNotes& notes, int lane) {
  const int num_threads = static_cast<int>(blockDim.x), batch_size = task.params.batch_size;
  const int sequences_per_thread = (batch_size + num_threads - 1) / num_threads;
  const int first = static_cast<int>(threadIdx.x) * sequences_per_thread;
  unsigned tiles = 0;
  for (int b = first; b < min(first + sequences_per_thread, batch_size); ++b)
    tiles += static_cast<unsigned>(span_of(task, b).num_tiles);
  const unsigned scan = warp_inclusive_scan(tiles, lane);
  notes.scan[threadIdx.x] = scan;
  if (lane == 31) notes.warp_tiles[threadIdx.x / 32] = scan;
  __syncthreads();
  const unsigned warp_scan = warp_inclusive_scan(32 * lane < num_threads ? notes.warp_tiles[lane] : 0, lane);
  const unsigned total = __shfl_sync(0xFFFFFFFFu, warp_scan, 31) * static_cast<unsigned>(task.items_per_sequence);
  WorkPlan plan(task, total, min(total, gridDim.x), 0);
  if (plan.warp_range.size() > 0)
    plan.first_item = find_item(task, plan.warp_range.begin, notes, warp_scan, sequences_per_thread, lane);
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
