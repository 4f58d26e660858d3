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

template <class Engine>
__device__ __forceinline__ void write_result(const DecodeTask& task, const Item& item, Engine& engine) {
  const DecodeParams& p = task.params;
  with_type(p.q_dtype, [&](auto zero) {
    using T = decltype(zero);
    float multiplier = 0.f;
    T* out = nullptr;
    engine.finish(
        [&](int, int channel, float value) {
          if (out != nullptr && channel < p.cache.head_dim)
            out[channel] = from_float<T>(multiplier == 0.f ? 0.f : value * multiplier);
        },
        [&](int r, float maximum, float sum, bool is_owner) {
          const Row row(task, item, r, Engine::kRows);
          out = row.is_real ? p.out.template at<T>(item.sequence, row.token, row.head) : nullptr;
          if (!row.is_real) return;
          const RowResult result = finish_row(task, row, item.kv_head, maximum, sum);
          multiplier = result.multiplier;
          if (is_owner && p.lse != nullptr) p.lse[lse_index(p, item.sequence, row)] = result.lse;
        });
  });
}

template <class Engine>
__device__ __forceinline__ void write_piece(Engine& engine, float* data) {
  const Piece<Engine::kRows, Engine::kHeadDim> piece{data};
  engine.finish([&](int row, int channel, float value) { *piece.values(row, channel) = value; },
                [&](int row, float maximum, float sum, bool is_owner) {
                  if (is_owner) piece.maximum(row) = maximum, piece.sum(row) = sum;
                });
}

// Reduces the warp's tiles. Items that lie wholly in its range are written at once, others noted.
template <class Engine, class Pipeline>
__device__ __forceinline__ void reduce_tiles(const DecodeTask& task, const WorkPlan& plan, char* memory, PieceNote* notes,
                                             int lane) {
  using Layout = KernelLayout<Engine, Pipeline>;
  constexpr int kAhead = Pipeline::kStages - 1;  // copies started before the first tile is read
  TileCursor cursor(task, plan.first_item, plan.warp_range.begin);
  const int num_tiles = static_cast<int>(plan.warp_range.size());
  Pipeline pipeline(task, cursor, num_tiles, memory, lane);
  Engine engine(task, memory + Layout::kStageBytes, lane);
  int piece_tile = -1;  // where the piece under way began in its item; -1: none is
  for (int i = -kAhead; i < num_tiles; ++i) {
    typename Pipeline::Stage stage = {};
    if (i >= 0) {
      if (piece_tile < 0) {
        piece_tile = cursor.tile;
        engine.begin(cursor.item, cursor.span);
      }
      stage = pipeline.wait();
    }
    pipeline.copy_next();
    if (i < 0) continue;
    engine.process(stage, cursor.span, cursor.first_token());
    const bool ends_item = cursor.tile + 1 == cursor.item.num_tiles, is_last = i + 1 == num_tiles;
    if (ends_item && piece_tile == 0) {
      write_result(task, cursor.item, engine);
    } else if (ends_item || is_last) {
      __syncwarp();
      const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
      float* data = is_last ? reinterpret_cast<float*>(memory) : task.warp_pieces + warp * Layout::ItemPiece::kFloats;
      write_piece(engine, data);
      if (lane == 0) notes[is_last] = {cursor.item, data};
    }
    if (ends_item) piece_tile = -1;
    if (!is_last) cursor.advance(task);
  }
}

// Announces this block's piece of an item; true for the last of the blocks that share the item.
__device__ __forceinline__ bool arrive_last(uint32_t* counter, int num_blocks, BlockNotes& notes) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    notes.is_last_block = atomicAdd(counter, 1u) == static_cast<uint32_t>(num_blocks - 1);
    if (notes.is_last_block) *counter = 0;  // ready for the next launch
  }
  __syncthreads();
  __threadfence();
  return notes.is_last_block;
}

// Calls f(item with its column set, column in the item, row) for the rows of an item that this warp takes.
template <int kRows, class F>
__device__ __forceinline__ void for_each_row(const DecodeTask& task, Item item, F f) {
  const int rows = min(kRows, task.num_rows), num_warps = static_cast<int>(blockDim.x / 32);
  for (int i = static_cast<int>(threadIdx.x / 32); i < rows * task.columns_per_block; i += num_warps) {
    const int column = i / rows, r = i - column * rows;
    item.set_column(task, column);
    const Row row(task, item, r, kRows);
    if (row.is_real) f(item, column, r, row);
  }
}

// Joins the pieces [begin, end) of notes.order, which belong to one item.
template <class ItemPiece>
__device__ __forceinline__ void merge_item(const DecodeTask& task, const WorkPlan& plan, BlockNotes& notes, int begin,
                                           int end) {
  constexpr int kRows = ItemPiece::kRows, kOwned = ItemPiece::kOwned;
  const Item first_column = notes.pieces[notes.order[begin]].item;
  const TileRange tiles = {first_column.first_tile, first_column.first_tile + first_column.num_tiles};
  const bool is_whole = tiles.begin >= plan.block_range.begin && tiles.end <= plan.block_range.end;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto block_piece = [&](int64_t block, bool is_second, int column) {
    return ItemPiece{task.block_pieces + ((2 * block + is_second) * task.columns_per_block + column) * ItemPiece::kFloats};
  };
  for_each_row<kRows>(task, first_column, [&](const Item& item, int column, int r, const Row& row) {
    const auto piece_at = [&](int i) { return ItemPiece{notes.pieces[notes.order[begin + i] + 2 * column].data}; };
    const auto merged = merge_row<ItemPiece>(end - begin, piece_at, r, lane);
    if (is_whole) return write_merged(task, item, row, merged, lane);
    const ItemPiece own = block_piece(blockIdx.x, tiles.begin > plan.block_range.begin, column);
#pragma unroll
    for (int j = 0; j < kOwned; j += 2)
      *reinterpret_cast<float2*>(own.values(r, lane * kOwned + j)) = make_float2(merged.values[j], merged.values[j + 1]);
    if (lane == 0) own.maximum(r) = merged.maximum, own.sum(r) = merged.sum;
  });
  if (is_whole) return;

  const int first_part = part_holding(tiles.begin, plan.total_tiles, plan.num_parts);
  const int num_parts = part_holding(tiles.end - 1, plan.total_tiles, plan.num_parts) - first_part + 1;
  const bool starts_inside = TileRange{0, plan.total_tiles}.part(first_part, plan.num_parts).begin < tiles.begin;
  const int counter = task.split == WorkSplit::kEqualRanges ? first_part : plan.first_block / task.max_parts;
  if (!arrive_last(task.counters + counter, num_parts, notes)) return;
  const int64_t first_block = plan.first_block + first_part;
  for_each_row<kRows>(task, first_column, [&](const Item& item, int column, int r, const Row& row) {
    const auto piece_at = [&](int i) { return block_piece(first_block + i, i == 0 && starts_inside, column); };
    write_merged(task, item, row, merge_row<ItemPiece>(num_parts, piece_at, r, lane), lane);
  });
}

template <class Engine, class Pipeline, int kMaxWarps>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) decode_kernel(const __grid_constant__ DecodeTask task) {
  using Layout = KernelLayout<Engine, Pipeline>;
  extern __shared__ __align__(128) char memory[];
  __shared__ BlockNotes notes;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
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
    for (int i = 0; i < static_cast<int>(blockDim.x / 16); i += 2 * task.columns_per_block)
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
