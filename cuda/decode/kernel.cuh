#pragma once

#include "decode/block_merge.cuh"
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
  // Its early piece (see PieceNote) follows where there is room.
  static constexpr bool kHasRoomForTwo = 2 * kPieceBytes <= kStageBytes;
  static constexpr int kBytesPerWarp = (kStageBytes + Engine::kSharedBytes + 127) / 128 * 128;
};

// Rows of a column's row tile that are no padding.
template <int kRows>
__device__ __forceinline__ int num_real_rows(const DecodeTask& task, const Item& item) {
  return min(kRows, task.num_rows - item.row_tile * kRows);
}

// Writes the rows of a piece that is a whole column.
template <class ItemPiece>
__device__ __forceinline__ void write_column(const DecodeTask& task, const Item& item, const ItemPiece& piece, int num_rows,
                                             int lane) {
#pragma unroll 1
  for (int r = 0; r < num_rows; ++r) {
    const Row row(task, item, r, ItemPiece::kRows);
    for (int quad = lane; quad < ItemPiece::kQuads; quad += 32)
      write_row(task, item, row, {piece.quad(r, quad), piece.maximum(r), piece.sum(r)}, quad);
  }
}

// Brings the `num_rows` rows of a warp's early piece to shared memory while others are still at their tiles: the join would
// have to wait for them.
template <class Layout>
__device__ __forceinline__ void fetch_early_piece(char* memory, const float* from, int num_rows, int lane) {
  using ItemPiece = typename Layout::ItemPiece;
  constexpr int kPairsPerRow = ItemPiece::kHeadDim / 2, kPairs = ItemPiece::kRows * (kPairsPerRow + 1);
  const uint32_t to = shared_address(memory + Layout::kPieceBytes);
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < kPairs; i += 32)
    if (i < num_rows * kPairsPerRow || i >= ItemPiece::kRows * kPairsPerRow)
      copy_async<8>(to + 8 * static_cast<uint32_t>(i), from + 2 * i, true);
  commit_copies();
  wait_copies<0>();
}

// Reduces the warp's tiles. Items that lie wholly in its range are written at once, others noted.
template <class Engine, class Pipeline>
__device__ __forceinline__ void reduce_tiles(const DecodeTask& task, const WorkPlan& plan, char* memory, PieceNote* early,
                                             PieceNote* last, int lane) {
  using Layout = KernelLayout<Engine, Pipeline>;
  using ItemPiece = typename Layout::ItemPiece;
  TileCursor cursor(task, plan.first_item, plan.warp_range.begin);
  const int num_tiles = static_cast<int>(plan.warp_range.size());
  Pipeline pipeline(task, cursor, num_tiles, memory, lane);
  Engine engine(task, memory + Layout::kStageBytes, lane);
  int early_rows = 0;
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
      float* data = warp_scratch<ItemPiece>(task, static_cast<int>(threadIdx.x / 32)) + is_whole * ItemPiece::kFloats;
      if (is_last) data = reinterpret_cast<float*>(memory);
      if (Layout::kPieceBytes <= Pipeline::kStageBytes && is_whole) data = reinterpret_cast<float*>(stage.k);
      const ItemPiece piece{data};
      const int num_rows = num_real_rows<Engine::kRows>(task, cursor.item);
      engine.store(piece, num_rows);
      __syncwarp();
      if (is_whole)
        write_column(task, cursor.item, piece, num_rows, lane);
      else if (lane == 0 && own_column(task) == 0)
        *(is_last ? last : early) = {cursor.item, true};
      if (!is_whole && !is_last) early_rows = num_rows;
      __syncwarp();
      if (!is_last) Pipeline::set_unit_scales(stage, lane);  // the piece may have lain on them
    }
    if (ends_item) piece_tile = -1;
    if (!is_last) cursor.advance(task);
  }
  if (Layout::kHasRoomForTwo && early_rows > 0)
    fetch_early_piece<Layout>(memory, warp_scratch<ItemPiece>(task, static_cast<int>(threadIdx.x / 32)), early_rows, lane);
}

template <class Engine, class Pipeline, int kMaxWarps>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) decode_kernel(const __grid_constant__ DecodeTask task) {
  using Layout = KernelLayout<Engine, Pipeline>;
  extern __shared__ __align__(128) char memory[];
  __shared__ BlockNotes notes;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32),
            set = warp >> task.columns_log2;
  if (threadIdx.x < 2) notes.is_shared[threadIdx.x] = false;
  if (threadIdx.x < kMaxWarpsPerBlock) notes.early[threadIdx.x].exists = notes.last[threadIdx.x].exists = false;
  overlap_launches();
  __syncthreads();
  const WorkPlan plan =
      task.split == WorkSplit::kEqualRanges ? plan_equal_ranges(task, notes.batch, lane) : plan_fixed_parts(task);
  if (plan.block_range.size() == 0) return;
  if (plan.warp_range.size() > 0)
    reduce_tiles<Engine, Pipeline>(task, plan, memory + warp * Layout::kBytesPerWarp, notes.early + set, notes.last + set,
                                   lane);
  __syncthreads();
  merge_pieces<Layout>(task, plan, memory, notes);
}

}  // namespace quantattn::cuda
