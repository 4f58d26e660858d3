#pragma once

#include "decode/block_merge.cuh"
#include "decode/tile_pipeline.cuh"

// The decoding kernel: one launch. Each warp reduces its range of tiles to pieces, a block joins the pieces of its warps, and
// of the units that share an item the last to arrive joins theirs.
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
__device__ __forceinline__ int num_real_rows(const QueryRange& queries, const Item& item) {
  return min(kRows, queries.num_rows - item.row_tile * kRows);
}

// Writes the rows of a piece that is a whole column.
template <class ItemPiece>
__device__ __forceinline__ void write_column(const auto& task, const Item& from, const ItemPiece& piece, int num_rows,
                                             int lane) {
  const Item item = from;
  const QueryRange queries = queries_of(task, item.sequence);
#pragma unroll 1
  for (int r = 0; r < num_rows; ++r) {
    const Row row(task, item, queries, r, ItemPiece::kRows);
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
__device__ __forceinline__ void reduce_tiles(const auto& task, const WorkPlan& plan, char* block_memory, BlockNotes& notes,
                                             int lane) {
  using Layout = KernelLayout<Engine, Pipeline>;
  using ItemPiece = typename Layout::ItemPiece;
  char* const memory = block_memory + warp_index() * Layout::kBytesPerWarp;
  const TileCursor cursor(plan.first_item, plan.first_span, plan.warp_range.begin);
  Pipeline pipeline(task, cursor, static_cast<int>(plan.warp_range.size()), memory, notes.items[warp_index()], lane);
  Engine engine(task, memory + Layout::kStageBytes, lane);
  int early_rows = 0;
  const ItemNote* note = nullptr;  // of the item whose piece is under way
  int first_token = 0;             // of the tile
  bool has_tile = false, is_last = false;
  while (!is_last) {
    typename Pipeline::Stage stage = {};
    if (has_tile) {
      stage = pipeline.wait();
      if (note == nullptr) {
        note = pipeline.item();
        first_token = note->first_token;
        engine.begin(note->item, note->span, pipeline.query());
      }
    }
    is_last = pipeline.has_last();
    pipeline.copy_next();
    if (!has_tile) {
      has_tile = true;
      continue;
    }
    engine.process(stage, note->span, first_token);
    first_token += kTileTokens;
    const bool ends_item = first_token == (note->span.first_tile + note->item.num_tiles) * kTileTokens;
    if (!ends_item && !is_last) continue;
    __syncwarp();
    const bool is_whole = ends_item && note->first_token == note->span.first_tile * kTileTokens;
    // A last piece lies in the stages, a whole one in the stage just read where it fits, others in the workspace.
    float* data = warp_scratch<ItemPiece>(task, warp_index()) + is_whole * ItemPiece::kFloats;
    if (is_last) data = reinterpret_cast<float*>(block_memory + warp_index() * Layout::kBytesPerWarp);
    if (Layout::kPieceBytes <= Pipeline::kStageBytes && is_whole) data = reinterpret_cast<float*>(stage.k);
    const ItemPiece piece{data};
    const int num_rows = num_real_rows<Engine::kRows>(queries_of(task, note->item.sequence), note->item);
    engine.store(piece, num_rows);
    __syncwarp();
    // What the note says is read again after the stores, which need the registers.
    if (is_whole)
      write_column(task, note->item, piece, num_rows, lane);
    else if (lane == 0 && own_column(task) == 0)
      (is_last ? notes.last : notes.early)[warp_index() >> task.columns_log2] = {note->item, true};
    if (!is_whole && !is_last) early_rows = num_rows;
    __syncwarp();
    if (!is_last) Pipeline::set_unit_scales(stage, lane);  // the piece may have lain on them
    note = nullptr;
  }
  if (Layout::kHasRoomForTwo && early_rows > 0)
    fetch_early_piece<Layout>(block_memory + warp_index() * Layout::kBytesPerWarp, warp_scratch<ItemPiece>(task, warp_index()),
                              early_rows, lane);
}

__device__ __forceinline__ void clear_notes(BlockNotes& notes) {
  const int thread = thread_index();
  if (thread < 2) notes.is_shared[thread] = false;
  if (thread < kMaxWarpsPerBlock) notes.early[thread].exists = notes.last[thread].exists = false;
}

template <class Engine, class Pipeline, int kMaxWarps, class Task>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) decode_kernel(const __grid_constant__ Task task) {
  using Layout = KernelLayout<Engine, Pipeline>;
  extern __shared__ __align__(128) char memory[];
  __shared__ BlockNotes notes;
  let_next_start();
  clear_notes(notes);
  __syncthreads();
  if (!task.may_start_early()) wait_for_previous();
  bool is_even = !task.is_fixed() && scan_batch(task, notes.batch);
  unsigned unit = blockIdx.x;
#pragma unroll 1
  while (true) {
    const int thread = thread_index(), lane = lane_index();
    const WorkPlan plan = make_plan(task, notes.batch, is_even, unit, lane);
    is_even = false;  // only dealt parts come in turn: no register has to keep it
    if (plan.block.range.size() == 0) break;
    if (thread == 0) notes.plan = plan.block;  // nothing of it need stay in registers
    if (plan.warp_range.size() > 0) reduce_tiles<Engine, Pipeline>(task, plan, memory, notes, lane);
    __syncthreads();
    merge_pieces<Layout>(task, notes.plan, memory, notes);
    if (!task.is_dealt()) break;
    unit = notes.plan.unit + gridDim.x;
    __syncthreads();
    clear_notes(notes);
    __syncthreads();
  }
  // Whatever comes next waits for this kernel alone, and must find the one before it finished, too.
  if (task.may_start_early() && blockIdx.x == 0) wait_for_previous();
}

}  // namespace quantattn::cuda
