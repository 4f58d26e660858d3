#pragma once

#include "decode/merge_pieces.cuh"
#include "decode/schedule.cuh"
#include "decode/tile_pipeline.cuh"

// The end of a unit: the pieces that the block's warps have left are joined, and of the units that share an item the last to
// arrive joins theirs. A step of a few microseconds ends with this while nothing else runs, so what counts is how many
// instructions follow one another.
namespace quantattn::cuda {

// What a set of warps (one for each column) leaves of an item that it could not finish, because others hold tiles of it too.
struct PieceNote {
  Item item;  // of the first column
  bool exists;
};

struct BlockNotes {
  BatchNotes batch;
  BlockPlan plan;
  ItemNote items[kMaxWarpsPerBlock][2];                         // of each warp: that it reads, and that it copies
  PieceNote early[kMaxWarpsPerBlock], last[kMaxWarpsPerBlock];  // of each set: before its last item, and of that
  Item shared[2];  // with other units: the item of the unit's first tile, and one that begins later and goes on
  bool is_shared[2], is_last_block[2];
};

// Where a warp writes its early piece, of which it has one at most, and beside it scratch for a whole item.
template <class ItemPiece>
__device__ __forceinline__ float* warp_scratch(const auto& task, int warp) {
  return task.warp_pieces +
         2 * static_cast<int64_t>(blockIdx.x * (blockDim.x / 32) + static_cast<unsigned>(warp)) * ItemPiece::kFloats;
}

// Pieces of one item that consecutive sets of a block have left: their last ones, and perhaps the early one of the set after.
struct PieceRun {
  int first_set, num_pieces;
  bool ends_early;  // the run's last piece is an early one
};

// All runs of a block, found by every warp for itself. Bit s of a mask stands for set s.
struct PieceRuns {
  unsigned early, joined;  // sets with an early piece; sets whose last piece goes on with that of the set before
  unsigned starts;         // bit 0: the early piece of set 0 is a run; bit s + 1: the last piece of set s begins one

  __device__ __forceinline__ PieceRuns(const BlockNotes& notes, int num_sets, int lane) {
    const int set = min(lane, num_sets - 1);
    const PieceNote& last_note = notes.last[set];
    const bool has_last = lane < num_sets && last_note.exists;
    const unsigned last = __ballot_sync(0xFFFFFFFFu, has_last);
    early = __ballot_sync(0xFFFFFFFFu, lane < num_sets && notes.early[set].exists);
    const unsigned first_tile = last_note.item.first_tile;  // no two items of a block begin at the same tile
    const bool is_same = __shfl_up_sync(0xFFFFFFFFu, first_tile, 1) == first_tile;
    joined = __ballot_sync(0xFFFFFFFFu, is_same && lane > 0) & last & last << 1;
    starts = (last & ~joined) << 1 | (early & 1u);
  }
  __device__ __forceinline__ PieceRun take_next() {
    const int start = __ffs(static_cast<int>(starts)) - 1;
    starts &= starts - 1;
    const int end = start + __ffs(static_cast<int>(~(joined >> start))) - 1;  // the first set that does not go on
    const bool ends_early = early >> end & 1u;
    return {max(start - 1, 0), (start == 0 ? 0 : end - start + 1) + ends_early, ends_early};
  }
};

// The units that share an item.
struct UnitsOfItem {
  unsigned first_unit;
  int num_units;
  bool starts_inside;  // the item begins after the first tile of the first of them

  __device__ __forceinline__ UnitsOfItem(const BlockPlan& plan, const Item& item) {
    first_unit = plan.first_unit;
    num_units = static_cast<int>(plan.num_own_units);
    starts_inside = false;
    if (num_units > 0) return;
    const unsigned first_part = plan.parts.holding(item.first_tile);
    num_units =
        static_cast<int>(plan.parts.holding(item.first_tile + static_cast<unsigned>(item.num_tiles) - 1) - first_part) + 1;
    starts_inside = plan.parts.begin(first_part) < item.first_tile;
    first_unit += first_part;
  }
};

// Where a unit leaves its pieces of a shared item, one for each column.
template <class ItemPiece>
__device__ __forceinline__ float* unit_piece(const auto& task, unsigned unit, bool begins_inside) {
  const int64_t index = int64_t{unit} * task.pieces_per_unit + begins_inside;
  return task.unit_pieces + (index << task.columns_log2) * ItemPiece::kFloats;
}

// Announces this block's pieces of shared items; notes of which it is the last to arrive.
__device__ __forceinline__ void announce_pieces(const auto& task, const BlockPlan& plan, BlockNotes& notes) {
  const int thread = thread_index();
  if (thread >= 2 || !notes.is_shared[thread]) return;
  const UnitsOfItem units(plan, notes.shared[thread]);
  uint32_t* counter = task.counters + units.first_unit;
  const bool is_last = add_ordered(counter, 1u) == static_cast<unsigned>(units.num_units) - 1;
  if (is_last) *counter = 0;  // ready for the next launch
  notes.is_last_block[thread] = is_last;
}

// Pieces to be joined: those of the first column, and how far on those of the next columns lie.
struct MergeJob {
  Item item;
  PieceList pieces;
  unsigned column_distance, elsewhere_column_distance;  // floats
  float* target;  // where the block's piece of a shared item goes; null: the item is whole and written out

  __device__ __forceinline__ PieceList column(int column) const {
    PieceList list = pieces;
    list.base += column * column_distance;
    list.elsewhere += column * elsewhere_column_distance;
    return list;
  }
};

// The join of a run. Where others share its item, that is noted.
template <class Layout>
__device__ __forceinline__ MergeJob join_of_run(const auto& task, const BlockPlan& plan, const PieceRun& run,
                                                const char* memory, BlockNotes& notes) {
  using ItemPiece = typename Layout::ItemPiece;
  constexpr unsigned kWarpFloats = Layout::kBytesPerWarp / sizeof(float);
  const int last = run.num_pieces - 1, warp = run.first_set << task.columns_log2,
            last_warp = warp + (last << task.columns_log2);
  const auto* floats = reinterpret_cast<const float*>(memory);
  MergeJob job;
  job.item = (last == 0 && run.ends_early ? notes.early : notes.last)[run.first_set].item;
  job.pieces = {run.num_pieces, floats + warp * kWarpFloats, kWarpFloats << task.columns_log2, run.ends_early ? last : -1,
                Layout::kHasRoomForTwo ? floats + last_warp * kWarpFloats + ItemPiece::kFloats
                                       : warp_scratch<ItemPiece>(task, last_warp)};
  job.column_distance = kWarpFloats;
  job.elsewhere_column_distance = Layout::kHasRoomForTwo ? kWarpFloats : 2 * ItemPiece::kFloats;
  job.target = nullptr;
  const unsigned item_end = job.item.first_tile + static_cast<unsigned>(job.item.num_tiles);
  if (job.item.first_tile < plan.range.begin || item_end > plan.range.end) {
    const bool begins_inside = job.item.first_tile > plan.range.begin;
    job.target = unit_piece<ItemPiece>(task, plan.unit, begins_inside);
    if (thread_index() == 0) notes.shared[begins_inside] = job.item, notes.is_shared[begins_inside] = true;
  }
  return job;
}

// The join of what units have left of an item that they share.
template <class ItemPiece>
__device__ __forceinline__ MergeJob join_of_units(const auto& task, const BlockPlan& plan, const Item& item) {
  const UnitsOfItem units(plan, item);
  const PieceList pieces = {units.num_units, unit_piece<ItemPiece>(task, units.first_unit, false),
                            static_cast<unsigned>(task.pieces_per_unit * ItemPiece::kFloats) << task.columns_log2,
                            units.starts_inside ? 0 : -1, unit_piece<ItemPiece>(task, units.first_unit, true)};
  return {item, pieces, ItemPiece::kFloats, ItemPiece::kFloats, nullptr};
}

// Joins the pieces of every row of an item.
template <class ItemPiece>
__device__ __forceinline__ void merge_item(const auto& task, MergeJob job) {
  const int thread = thread_index(), lane = thread % 32, num_warps = static_cast<int>(blockDim.x / 32);
  const QueryRange queries = queries_of(task, job.item.sequence);
  const int num_rows = min(ItemPiece::kRows, queries.num_rows) << task.columns_log2;
  const MergeTeam<ItemPiece> team(job.pieces.count, num_rows, num_warps);
#pragma unroll 1
  for (int i = thread / 32; i < num_rows << team.parts_log2(); i += num_warps) {
    const int column = i & (columns_per_block(task) - 1), part = i >> task.columns_log2 & ((1 << team.parts_log2()) - 1);
    const int r = i >> task.columns_log2 >> team.parts_log2();
    job.item.set_column(task, column);
    const Row row(task, job.item, queries, r, ItemPiece::kRows);
    if (!row.is_real) continue;
    const int quad = (part << team.lanes_log2) + (lane & (team.group_lanes() - 1));
    const RowSums merged = merge_row<ItemPiece>(team, job.column(column), r, quad, lane);
    if (lane >= team.group_lanes()) continue;
    if (job.target == nullptr) {
      write_row(task, job.item, row, merged, quad);
    } else {
      const ItemPiece own{job.target + column * ItemPiece::kFloats};
      own.quad(r, quad) = merged.values;
      if (quad == 0) own.maximum(r) = merged.maximum, own.sum(r) = merged.sum;
    }
  }
}

// Joins what the warps of this block have left, then, where it is the last of the blocks that share an item, theirs. One loop
// over both, so that the code of the join is there once.
template <class Layout>
__device__ __forceinline__ void merge_pieces(const auto& task, const BlockPlan& plan, const char* memory, BlockNotes& notes) {
  using ItemPiece = typename Layout::ItemPiece;
  PieceRuns runs(notes, plan.num_sets, thread_index() % 32);
  int next_shared = -1;  // below 0: the runs of this block are not all joined
#pragma unroll 1
  while (true) {
    MergeJob job;
    if (runs.starts != 0) {
      job = join_of_run<Layout>(task, plan, runs.take_next(), memory, notes);
    } else {
      if (next_shared < 0) {
        __syncthreads();
        announce_pieces(task, plan, notes);
        __syncthreads();
      }
      do ++next_shared;
      while (next_shared < 2 && !(notes.is_shared[next_shared] && notes.is_last_block[next_shared]));
      if (next_shared >= 2) return;
      job = join_of_units<ItemPiece>(task, plan, notes.shared[next_shared]);
    }
    merge_item<ItemPiece>(task, job);
  }
}

}  // namespace quantattn::cuda
