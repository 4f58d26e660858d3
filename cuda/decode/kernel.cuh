#pragma once

#include "decode/merge_pieces.cuh"
#include "decode/tile_pipeline.cuh"

// The decoding kernel: one launch. Each warp reduces its range of tiles to pieces, a block joins the pieces of its warps, and
// of the blocks that share an item the last to arrive joins theirs.
namespace quantattn::cuda {

template <class Engine, class Pipeline>
struct KernelLayout {
  using ItemPiece = Piece<Engine::kRows, Engine::kHeadDim>;
  static constexpr int kPieceBytes = ItemPiece::kFloats * static_cast<int>(sizeof(float));
  // A warp's last piece takes the place of its stages.
  static constexpr int kStageBytes = Pipeline::kBytes > kPieceBytes ? Pipeline::kBytes : kPieceBytes;
  static constexpr int kBytesPerWarp = (kStageBytes + Engine::kSharedBytes + 127) / 128 * 128;
};

// A piece that its warp could not finish, because other warps hold tiles of the same item.
struct PieceNote {
  Item item;
  float* data;  // shared memory, or the workspace where the warp had more items to do; null: none
};

struct BlockNotes {
  PieceNote pieces[2 * kMaxWarpsPerBlock];  // two for each warp, in the order of their tiles
  int order[2 * kMaxWarpsPerBlock];         // those of the first column that exist
  int count;
  bool is_last_block;
};

// Writes the rows of a piece that is a whole column.
template <class ItemPiece>
__device__ __forceinline__ void write_column(const DecodeTask& task, const Item& item, const ItemPiece& piece,
                                             const RowConstants* rows, int num_rows, int lane) {
#pragma unroll 1
  for (int r = 0; r < num_rows; ++r) {
    RowSums<ItemPiece::kOwned> sums;
    sums.maximum = piece.maximum(r);
    sums.sum = piece.sum(r);
    read_values(piece.values(r, lane * ItemPiece::kOwned), sums.values);
    write_row(task, item, Row(task, item, r, ItemPiece::kRows), sums, rows[r].v_scale, rows[r].sink, lane);
  }
}

// Rows of a column's row tile that are no padding.
template <int kRows>
__device__ __forceinline__ int num_real_rows(const DecodeTask& task, const Item& item) {
  return min(kRows, task.num_rows - item.row_tile * kRows);
}

// Reduces the warp's tiles. Items that lie wholly in its range are written at once, others noted.
template <class Engine, class Pipeline>
__device__ __forceinline__ void reduce_tiles(const DecodeTask& task, const WorkPlan& plan, char* memory, PieceNote* notes,
                                             int lane) {
  using Layout = KernelLayout<Engine, Pipeline>;
  using ItemPiece = typename Layout::ItemPiece;
  TileCursor cursor(task, plan.first_item, plan.warp_range.begin);
  const int num_tiles = static_cast<int>(plan.warp_range.size());
  Pipeline pipeline(task, cursor, num_tiles, memory, lane);
  Engine engine(task, memory + Layout::kStageBytes, lane);
  int piece_tile = -1;  // where the piece under way began in its item; -1: none is
  for (int i = -1; i < num_tiles; ++i) {
    typename Pipeline::Stage stage = {};
    if (i >= 0) {
      stage = pipeline.wait();
      if (piece_tile < 0) {
        piece_tile = cursor.tile;
        engine.begin(cursor.item, cursor.span, pipeline.query());
      }
    }
    pipeline.copy_next();
    if (i < 0) continue;
    engine.process(stage, cursor.span, cursor.first_token());
    const bool ends_item = cursor.tile + 1 == cursor.item.num_tiles, is_last = i + 1 == num_tiles;
    if (ends_item || is_last) {
      __syncwarp();
      const bool is_whole = ends_item && piece_tile == 0;
      // A last piece lies in the stages, a whole one in the stage just read where it fits, others in the workspace.
      float* data =
          task.warp_pieces +
          (2 * static_cast<int64_t>(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) + is_whole) * ItemPiece::kFloats;
      if (is_last) data = reinterpret_cast<float*>(memory);
      if (Layout::kPieceBytes <= Pipeline::kStageBytes && is_whole) data = reinterpret_cast<float*>(stage.k);
      const ItemPiece piece{data};
      const int num_rows = num_real_rows<Engine::kRows>(task, cursor.item);
      engine.store(piece, num_rows);
      __syncwarp();
      if (is_whole)
        write_column(task, cursor.item, piece, engine.rows(), num_rows, lane);
      else if (lane == 0)
        notes[is_last] = {cursor.item, data};
      __syncwarp();
      if (!is_last) Pipeline::set_unit_scales(stage, lane);  // the piece may have lain on them
    }
    if (ends_item) piece_tile = -1;
    if (!is_last) cursor.advance(task);
  }
}

// Announces this block's pieces of an item; true for the last of the blocks that share the item.
__device__ __forceinline__ bool arrive_last(uint32_t* counter, unsigned num_blocks, BlockNotes& notes) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    notes.is_last_block = atomicAdd(counter, 1u) == num_blocks - 1;
    if (notes.is_last_block) *counter = 0;  // ready for the next launch
    __threadfence();
  }
  __syncthreads();
  return notes.is_last_block;
}

// Joins the pieces [begin, end) of notes.order, which belong to one item: first those of this block's warps, then, in the last
// block to arrive, those of the blocks. A warp takes a row at a time.
template <class ItemPiece>
__device__ __forceinline__ void merge_item(const DecodeTask& task, const WorkPlan& plan, BlockNotes& notes, int begin,
                                           int end) {
  constexpr int kOwned = ItemPiece::kOwned;
  Item item = notes.pieces[notes.order[begin]].item;
  const unsigned last_tile = item.first_tile + static_cast<unsigned>(item.num_tiles) - 1;
  const bool is_whole = item.first_tile >= plan.block_range.begin && last_tile < plan.block_range.end;
  const int lane = static_cast<int>(threadIdx.x % 32), columns = columns_per_block(task);
  const auto block_piece = [&](unsigned block, bool is_second, int column) {
    return task.block_pieces + ((2 * static_cast<int64_t>(block) + is_second) * columns + column) * ItemPiece::kFloats;
  };
  unsigned first_block = 0;
  bool starts_inside = false;
  int num_pieces = end - begin;
#pragma unroll 1
  for (bool is_final = is_whole, is_joint = false;; is_final = is_joint = true) {
    for (int i = static_cast<int>(threadIdx.x / 32); i < min(ItemPiece::kRows, task.num_rows) * columns;
         i += static_cast<int>(blockDim.x / 32)) {
      const int column = i & (columns - 1), r = i >> task.columns_log2;
      item.set_column(task, column);
      const Row row(task, item, r, ItemPiece::kRows);
      if (!row.is_real) continue;
      const auto address_of = [&](int j) {
        return is_joint ? block_piece(first_block + static_cast<unsigned>(j), j == 0 && starts_inside, column)
                        : notes.pieces[notes.order[begin + j] + 2 * column].data;
      };
      const RowSums<kOwned> merged = merge_row<ItemPiece>(num_pieces, address_of, r, lane);
      if (is_final) {
        RowInputs inputs;
        inputs.read(task, item.sequence, item.kv_head, row);
        write_row(task, item, row, merged, inputs.v_scale, inputs.sink, lane);
        continue;
      }
      const ItemPiece own{block_piece(blockIdx.x, item.first_tile > plan.block_range.begin, column)};
#pragma unroll
      for (int j = 0; j < kOwned; ++j) own.values(r, lane * kOwned)[j] = merged.values[j];
      own.maximum(r) = merged.maximum;
      own.sum(r) = merged.sum;
    }
    if (is_final) return;
    const unsigned first_part = plan.parts.holding(item.first_tile);
    num_pieces = static_cast<int>(plan.parts.holding(last_tile) - first_part) + 1;
    starts_inside = plan.parts.begin(first_part) < item.first_tile;
    first_block = plan.first_block + first_part;
    const unsigned counter =
        task.split == WorkSplit::kEqualRanges ? first_part : plan.first_block / static_cast<unsigned>(task.max_parts);
    if (!arrive_last(task.counters + counter, static_cast<unsigned>(num_pieces), notes)) return;
  }
}

template <class Engine, class Pipeline, int kMaxWarps>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) decode_kernel(const __grid_constant__ DecodeTask task) {
  using Layout = KernelLayout<Engine, Pipeline>;
  extern __shared__ __align__(128) char memory[];
  __shared__ BlockNotes notes;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  overlap_launches();
  const WorkPlan plan = task.split == WorkSplit::kEqualRanges ? plan_equal_ranges(task, lane) : plan_fixed_parts(task);
  if (plan.block_range.size() == 0) return;

  PieceNote* own_notes = notes.pieces + 2 * warp;
  if (lane < 2) own_notes[lane].data = nullptr;
  __syncwarp();
  if (plan.warp_range.size() > 0)
    reduce_tiles<Engine, Pipeline>(task, plan, memory + warp * Layout::kBytesPerWarp, own_notes, lane);
  __syncthreads();
  if (threadIdx.x == 0) {
    notes.count = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x / 16); i += 2 * columns_per_block(task))
      for (int j = i; j < i + 2; ++j)
        if (notes.pieces[j].data != nullptr) notes.order[notes.count++] = j;
  }
  __syncthreads();
  for (int begin = 0, end = 0; begin < notes.count; begin = end) {
    const Item item = notes.pieces[notes.order[begin]].item;
    while (end < notes.count && notes.pieces[notes.order[end]].item.is_same_item(item)) ++end;
    merge_item<typename Layout::ItemPiece>(task, plan, notes, begin, end);
  }
}

}  // namespace quantattn::cuda
