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
  PieceNote pieces[2 * kWarpsPerBlock];  // in the order of their tiles
  int order[2 * kWarpsPerBlock];         // those that exist
  int count;
  bool is_last_block;
};

template <class Engine>
__device__ __forceinline__ void write_result(const DecodeTask& task, const Item& item, Engine& engine) {
  const DecodeParams& p = task.params;
  RowResult result = {};
  int64_t offset = -1;
  engine.finish(
      [&](int, int channel, float value) {
        if (offset < 0 || channel >= p.cache.head_dim) return;
        store_element(p.out.data, offset + channel, p.q_dtype, result.multiplier == 0.f ? 0.f : value * result.multiplier);
      },
      [&](int r, float maximum, float sum, bool is_owner) {
        const Row row(task, item, r, Engine::kRows);
        offset = row.is_real ? p.out.offset(item.sequence, row.token, row.head) : -1;
        if (!row.is_real) return;
        result = finish_row(task, row, item.kv_head, maximum, sum);
        if (is_owner && p.lse != nullptr) p.lse[lse_index(p, item.sequence, row)] = result.lse;
      });
}

template <class Engine>
__device__ __forceinline__ void write_piece(Engine& engine, float* data) {
  const Piece<Engine::kRows, Engine::kHeadDim> piece{data};
  engine.finish([&](int row, int channel, float value) { piece.value(row, channel) = value; },
                [&](int row, float maximum, float sum, bool is_owner) {
                  if (is_owner) piece.maximum(row) = maximum, piece.sum(row) = sum;
                });
}

// Reduces the warp's tiles. Items that lie wholly in its range are written at once, others noted.
template <class Engine, class Pipeline>
__device__ __forceinline__ void reduce_tiles(const DecodeTask& task, const WorkPlan& plan, char* memory, PieceNote* notes,
                                             int lane) {
  using Layout = KernelLayout<Engine, Pipeline>;
  TileCursor cursor;
  cursor.seek(task, plan.first_item, plan.warp_range.begin);
  int remaining = static_cast<int>(plan.warp_range.size());
  Pipeline pipeline(task, memory, lane);
  pipeline.start(cursor, remaining);
  Engine engine(task, memory + Layout::kStageBytes, lane);
  for (int piece_tile = -1; remaining > 0; --remaining, cursor.advance(task)) {
    if (piece_tile < 0) {
      piece_tile = cursor.tile;
      engine.begin(cursor.item, cursor.span);
    }
    engine.process(pipeline.next(), cursor.span, cursor.first_token());
    const bool ends_item = cursor.tile + 1 == cursor.item.num_tiles, is_last = remaining == 1;
    if (!ends_item && !is_last) continue;
    if (ends_item && piece_tile == 0) {
      write_result(task, cursor.item, engine);
    } else {
      __syncwarp();
      const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
      float* data = is_last ? reinterpret_cast<float*>(memory) : task.warp_pieces + warp * Layout::ItemPiece::kFloats;
      write_piece(engine, data);
      if (lane == 0) notes[is_last] = {cursor.item, data};
    }
    piece_tile = -1;
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

// Joins the pieces [begin, end) of notes.order, which belong to one item.
template <class ItemPiece, int kRows, int kHeadDim>
__device__ __forceinline__ void merge_item(const DecodeTask& task, const WorkPlan& plan, BlockNotes& notes, int begin, int end) {
  const Item item = notes.pieces[notes.order[begin]].item;
  const TileRange tiles = {item.first_tile, item.first_tile + item.num_tiles};
  const bool is_whole = tiles.begin >= plan.block_range.begin && tiles.end <= plan.block_range.end;
  const int block = static_cast<int>(blockIdx.x);
  const ItemPiece own{task.block_pieces + (2 * int64_t{block} + (tiles.begin > plan.block_range.begin)) * ItemPiece::kFloats};
  const auto for_each_group = [&](auto f) {
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kHeadDim / 4; i += static_cast<int>(blockDim.x))
      f(i / (kHeadDim / 4), i % (kHeadDim / 4) * 4);
  };
  for_each_group([&](int r, int channel) {
    const auto piece_at = [&](int i) { return ItemPiece{notes.pieces[notes.order[begin + i]].data}; };
    const MergedValues merged = merge_values(end - begin, piece_at, r, channel);
    if (is_whole) return write_merged(task, item, Row(task, item, r, kRows), channel, merged);
    own.values(r, channel) = merged.values;
    if (channel == 0) own.maximum(r) = merged.maximum, own.sum(r) = merged.sum;
  });
  if (is_whole) return;

  const int first_part = part_holding(tiles.begin, plan.total_tiles, plan.num_parts);
  const int num_parts = part_holding(tiles.end - 1, plan.total_tiles, plan.num_parts) - first_part + 1;
  const bool starts_inside = TileRange{0, plan.total_tiles}.part(first_part, plan.num_parts).begin < tiles.begin;
  const int counter = task.split == WorkSplit::kEqualRanges ? first_part : item_index(task, item);
  if (!arrive_last(task.counters + counter, num_parts, notes)) return;
  float* const first = task.block_pieces + 2 * int64_t{plan.first_block + first_part} * ItemPiece::kFloats;
  for_each_group([&](int r, int channel) {
    const auto piece_at = [&](int i) { return ItemPiece{first + (2 * i + (i == 0 && starts_inside)) * int64_t{ItemPiece::kFloats}}; };
    write_merged(task, item, Row(task, item, r, kRows), channel, merge_values(num_parts, piece_at, r, channel));
  });
}

template <class Engine, class Pipeline, int kMinBlocks>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocks) decode_kernel(const __grid_constant__ DecodeTask task) {
  using Layout = KernelLayout<Engine, Pipeline>;
  extern __shared__ __align__(128) char memory[];
  __shared__ BlockNotes notes;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const WorkPlan plan = task.split == WorkSplit::kEqualRanges ? plan_equal_ranges(task, lane) : plan_fixed_parts(task);
  if (plan.block_range.size() == 0) return;

  PieceNote* own_notes = notes.pieces + 2 * warp;
  if (lane < 2) own_notes[lane].data = nullptr;
  __syncwarp();
  if (plan.warp_range.size() > 0) reduce_tiles<Engine, Pipeline>(task, plan, memory + warp * Layout::kBytesPerWarp, own_notes, lane);
  __syncthreads();
  if (threadIdx.x == 0) {
    notes.count = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x / 16); ++i)
      if (notes.pieces[i].data != nullptr) notes.order[notes.count++] = i;
  }
  __syncthreads();
  for (int begin = 0, end = 0; begin < notes.count; begin = end) {
    const Item item = notes.pieces[notes.order[begin]].item;
    while (end < notes.count && notes.pieces[notes.order[end]].item == item) ++end;
    merge_item<typename Layout::ItemPiece, Engine::kRows, Engine::kHeadDim>(task, plan, notes, begin, end);
  }
}

}  // namespace quantattn::cuda
