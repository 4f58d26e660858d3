#pragma once

#include "decode/sequences.cuh"

// The plan that other libraries make on the host, made by every block for itself from the lengths: which tiles are mine, and
// which blocks share my items. Reads lengths only, so it is right on every replay of a captured graph.
namespace quantattn::cuda {

// Warps of a block that share a part: to join one more piece costs as much as a few tiles. Eight warps take two tiles each,
// more of them four. H100, int8: 32/8 heads 1 x 256 takes 8.9 us where 8 warps share 16 tiles and 10.4 us where 4 do; 64/8
// heads 1 x 8k takes 17.2 us where 16 warps share 32 tiles and 15.9 us where 8 do.
inline constexpr unsigned kFewTilesPerWarp = 2, kWarpsOfFewTiles = 8, kTilesPerWarp = 4;

// A half-open range of tile numbers.
struct TileRange {
  unsigned begin, end;
  __device__ __forceinline__ unsigned size() const { return end - begin; }
};

// [0, total) cut into `count` parts that differ by at most one; the longer ones come first.
struct EqualParts {
  unsigned quotient, remainder;

  EqualParts() = default;

  __device__ __forceinline__ EqualParts(unsigned total, unsigned count)
      : quotient(total / count), remainder(total - quotient * count) {}
  __device__ __forceinline__ unsigned begin(unsigned part) const { return quotient * part + min(part, remainder); }
  __device__ __forceinline__ TileRange range(unsigned part) const { return {begin(part), begin(part + 1)}; }
  __device__ __forceinline__ unsigned holding(unsigned tile) const {
    const unsigned longer = remainder * (quotient + 1);
    return tile < longer ? tile / (quotient + 1) : remainder + (tile - longer) / quotient;
  }
};

// What one block does in a unit. All tiles (kEqualRanges) or those of an item are cut into parts, one for each unit from
// `first_unit` on.
struct BlockPlan {
  unsigned unit, first_unit;
  unsigned num_own_units;  // of the item, where each item has its own; else 0
  int num_sets;            // sets of warps that have a range
  EqualParts parts;
  TileRange range;  // empty for a unit beyond the last part
};

// What one of its warps does: a part is cut into ranges, one for each set of warps that covers the columns.
struct WorkPlan {
  BlockPlan block;
  TileRange warp_range;
  Item first_item;  // holds warp_range.begin, where warp_range is not empty
  SequenceSpan first_span;

  __device__ __forceinline__ void cut(const auto& task, unsigned unit, unsigned total_tiles, unsigned num_parts,
                                      unsigned first_unit, unsigned num_own_units) {
    block = {unit, first_unit, num_own_units, 0, EqualParts(total_tiles, max(num_parts, 1u)), {0, 0}};
    const unsigned part = unit - first_unit;
    if (part < num_parts) block.range = block.parts.range(part);
    const unsigned set = static_cast<unsigned>(warp_index()) >> task.columns_log2, size = block.range.size();
    const unsigned few = min(size / kFewTilesPerWarp, kWarpsOfFewTiles >> task.columns_log2);
    const unsigned busy_sets = min(static_cast<unsigned>(task.warps_per_column), max(1u, max(few, size / kTilesPerWarp)));
    block.num_sets = static_cast<int>(busy_sets);
    warp_range = set < busy_sets ? EqualParts(size, busy_sets).range(set) : TileRange{0, 0};
    warp_range.begin += block.range.begin;
    warp_range.end += block.range.begin;
  }
};

__device__ __forceinline__ int parts_of(const auto& task, int num_tiles) {
  const unsigned long_enough = task.min_part_tiles.quotient(static_cast<unsigned>(num_tiles) + task.min_part_tiles.divisor - 1);
  return static_cast<int>(min(task.max_parts.divisor, long_enough));
}

// How long an item of a sequence is in the numbering of all work: in tiles, or in parts.
__device__ __forceinline__ unsigned item_length(const auto& task, const SequenceSpan& span) {
  return static_cast<unsigned>(task.split == WorkSplit::kEqualRanges ? span.num_tiles : parts_of(task, span.num_tiles));
}

// The same of a sequence. Where all sequences have equally many items, one item of each is counted.
__device__ __forceinline__ unsigned counted_length(const auto& task, int sequence, unsigned length) {
  return task.is_ragged() ? length * static_cast<unsigned>(items_of(task, sequence)) : length;
}
__device__ __forceinline__ unsigned items_per_count(const auto& task) {
  return task.is_ragged() ? 1u : task.items_per_sequence.divisor;
}

__device__ __forceinline__ unsigned warp_inclusive_scan(unsigned x, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned below = __shfl_up_sync(0xFFFFFFFFu, x, distance);
    if (lane >= distance) x += below;
  }
  return x;
}

// Each thread of a block stands for equally many neighbouring sequences.
struct BatchNotes {
  unsigned scan[32 * kMaxWarpsPerBlock];  // counted lengths of a thread's sequences and of those of lower lanes
  unsigned warp_total[kMaxWarpsPerBlock];
};

__device__ __forceinline__ int sequences_per_thread(const auto& task) {
  const int num_threads = static_cast<int>(blockDim.x);  // a power of two
  return (task.params.batch_size + num_threads - 1) >> (31 - __clz(num_threads));
}

// Returns whether an even cut is prepared, all sequences have equally many tiles, and each of a ragged batch has the rows for
// which it is prepared.
__device__ __forceinline__ bool scan_batch(const auto& task, BatchNotes& notes) {
  const int thread = thread_index(), lane = thread % 32, first = thread * sequences_per_thread(task);
  bool is_even = task.has_even_cut();
  const int usual = is_even ? span_of(task, 0).num_tiles : 0;
  unsigned length = 0;
  for (int b = first; b < min(first + sequences_per_thread(task), task.params.batch_size); ++b) {
    const SequenceSpan span = span_of(task, b);
    is_even &= span.num_tiles == usual && (!task.is_ragged() || queries_of(task, b).num_rows == task.num_rows);
    length += counted_length(task, b, item_length(task, span));
  }
  const unsigned scan = warp_inclusive_scan(length, lane);
  notes.scan[thread] = scan;
  if (lane == 31) notes.warp_total[thread / 32] = scan;
  return __syncthreads_and(is_even) != 0;
}

struct BatchScan {
  unsigned warp_scan;  // lane w: counted lengths up to the end of warp w's sequences
  unsigned total;      // length of the whole batch

  __device__ __forceinline__ BatchScan(const auto& task, const BatchNotes& notes, int lane)
      : warp_scan(warp_inclusive_scan(32 * lane < static_cast<int>(blockDim.x) ? notes.warp_total[lane] : 0, lane)),
        total(__shfl_sync(0xFFFFFFFFu, warp_scan, 31) * items_per_count(task)) {}
};

// An item and its place in the numbering of all work: where it begins, and how long it is. Its column is not set.
struct FoundItem {
  Item item;
  SequenceSpan span;
  unsigned begin, length;
};

// The item that holds a place.
__device__ __forceinline__ FoundItem find_item(const auto& task, unsigned place, const BatchNotes& notes, const BatchScan& scan,
                                               int lane) {
  const unsigned per_count = items_per_count(task);
  const int warp = __ffs(static_cast<int>(__ballot_sync(0xFFFFFFFFu, scan.warp_scan * per_count > place))) - 1;
  unsigned before = __shfl_sync(0xFFFFFFFFu, scan.warp_scan, warp) - notes.warp_total[warp];
  const unsigned thread_scan = before + notes.scan[32 * warp + lane];
  const int thread = __ffs(static_cast<int>(__ballot_sync(0xFFFFFFFFu, thread_scan * per_count > place))) - 1;
  if (thread > 0) before = __shfl_sync(0xFFFFFFFFu, thread_scan, thread - 1);
  FoundItem found = {};
  found.item.sequence = (32 * warp + thread) * sequences_per_thread(task);
  while (true) {
    found.span = span_of(task, found.item.sequence);
    found.length = item_length(task, found.span);
    const unsigned counted = counted_length(task, found.item.sequence, found.length);
    if ((before + counted) * per_count > place) break;
    before += counted;
    ++found.item.sequence;
  }
  const unsigned index = (place - before * per_count) / found.length;
  found.item.index = static_cast<int>(index);
  found.begin = before * per_count + index * found.length;
  return found;
}

// The item of a unit where each item has its own units.
__device__ __forceinline__ FoundItem fixed_item(const auto& task, unsigned unit) {
  const unsigned number = task.max_parts.quotient(unit), each = task.items_per_sequence.divisor;
  FoundItem found = {};
  found.item.sequence = static_cast<int>(task.items_per_sequence.quotient(number));
  found.item.index = static_cast<int>(number) - found.item.sequence * static_cast<int>(each);
  found.span = span_of(task, found.item.sequence);
  found.begin = number * task.max_parts.divisor;
  found.length = static_cast<unsigned>(parts_of(task, found.span.num_tiles));
  return found;
}

// Equal ranges are cut before the item is found that a warp begins with, other units after.
__device__ __forceinline__ WorkPlan make_plan(const auto& task, const BatchNotes& notes, bool is_even, unsigned unit,
                                              int lane) {
  WorkPlan plan = {};
  if (is_even && unit >= task.even_units) return plan;
  const bool has_own_units = task.is_fixed() || (is_even && task.max_parts.divisor > 0);
  const bool has_range = !has_own_units && task.split == WorkSplit::kEqualRanges;
  FoundItem found;
  if (has_own_units) {
    found = fixed_item(task, unit);
  } else {
    const BatchScan scan(task, notes, lane);
    unsigned place = unit;
    if (has_range) {
      plan.cut(task, unit, scan.total, min(scan.total, is_even ? task.even_units : gridDim.x), 0, 0);
      place = plan.warp_range.begin;
      if (plan.warp_range.size() == 0) return plan;
    } else if (unit >= min(scan.total, task.max_units)) {
      return plan;
    }
    found = find_item(task, place, notes, scan, lane);
    if (task.is_ragged() && task.has_item_spans) found.span = span_of_item(task, found.item);
  }
  found.item.num_tiles = found.span.num_tiles;
  found.item.first_tile = has_range ? found.begin : 0;
  found.item.set_column(task, own_column(task));
  if (!has_range) plan.cut(task, unit, static_cast<unsigned>(found.item.num_tiles), found.length, found.begin, found.length);
  plan.first_item = found.item;
  plan.first_span = found.span;
  return plan;
}

}  // namespace quantattn::cuda
