#pragma once

#include "prefill/engine.cuh"
#include "prefill/query_chunk.cuh"

// The prefill kernel: a block for each row tile and KV head.
namespace quantattn::cuda {

// How a block is built. The small one fits GPUs with 99 KiB of shared memory for a block.
enum class BlockSize { kLarge, kSmall };

template <class KFormat, class VFormat, int kHeadDim, BlockSize kBlockSize>
struct PrefillShape {
  static constexpr bool kIsSmall = kBlockSize == BlockSize::kSmall;
  // 32 rows of a warp share every operand of K and V that they load; with head_dim 256 the sums of 16 fill the registers.
  static constexpr int kRowTiles = kHeadDim <= 128 ? 2 : 1, kWarps = kHeadDim <= 128 || kIsSmall ? 4 : 8;
  static constexpr int kThreads = 32 * kWarps, kBlockRows = 16 * kRowTiles * kWarps;
  static constexpr int kKeys = !kIsSmall ? 64 : kHeadDim <= 128 ? 32 : 16;
  static constexpr int kBlocksPerMultiprocessor = kIsSmall || kHeadDim > 128 ? 1 : 2;
  using Engine = PrefillEngine<KFormat, VFormat, kHeadDim, kRowTiles, kKeys>;
  using Tiles = KeyTiles<KFormat, VFormat, kHeadDim, kKeys, kThreads>;
  using Layout = OperandLayout<kHeadDim>;
  static constexpr int kQueryBytes = kBlockRows * Layout::kRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + Tiles::kBytes + static_cast<int>(sizeof(typename Tiles::Notes)) +
                                      kBlockRows * static_cast<int>(sizeof(PrefillRow));
  static constexpr int kStaticBytes = 1024;  // at most
  static_assert(!kIsSmall || kSharedBytes + kStaticBytes <= 99 * 1024);
};

// Starts to copy the block's query rows, which are operands as they are. Rows beyond the last are zeros.
template <class Shape>
__device__ __forceinline__ void copy_queries(const PrefillTask& task, const RowTile& tile, char* queries) {
  constexpr int kChunks = Shape::Layout::kChunks, kRowsPerStep = Shape::kThreads / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
#pragma unroll 4
  for (int r = static_cast<int>(threadIdx.x) / kChunks; r < Shape::kBlockRows; r += kRowsPerStep) {
    const int row = tile.first_row + min(r, tile.num_rows - 1), token = token_of_row(task, row);
    const uint16_t* from =
        task.q.at<const uint16_t>(0, tile.first_token + token, head_of_row(task, tile.kv_head, row, token)) + 8 * chunk;
    copy_async<16>(shared_address(queries + Shape::Layout::chunk_offset(r, chunk)), from,
                   r < tile.num_rows && 8 * chunk < task.head_dim);
  }
}

// Converts the block's query rows to operands; `units` receives what their products have to be multiplied by.
template <class Shape, class WidenK>
__device__ __forceinline__ void convert_queries(const PrefillTask& task, const RowTile& tile, char* queries, float* units) {
  constexpr int kChunks = Shape::Layout::kChunks, kRowsPerStep = Shape::kThreads / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const unsigned sign = score_scale(task, tile.kv_head) < 0.f ? 0x80008000u : 0u;
#pragma unroll 1
  for (int r = static_cast<int>(threadIdx.x) / kChunks; r < Shape::kBlockRows; r += kRowsPerStep) {
    uint4 x = {};
    if (r < tile.num_rows) {
      const int row = tile.first_row + r, token = token_of_row(task, row);
      x = read_query_chunk(
          task, task.q.at<const uint16_t>(0, tile.first_token + token, head_of_row(task, tile.kv_head, row, token)), chunk);
    }
    float unit = 1.f;
    if (!WidenK::kIsBf16 && task.q_dtype == DType::kBFloat16) unit = convert_query_chunk<kChunks>(x);
    x.x ^= sign, x.y ^= sign, x.z ^= sign, x.w ^= sign;
    *reinterpret_cast<uint4*>(queries + Shape::Layout::chunk_offset(r, chunk)) = x;
    if (chunk == 0) units[r] = unit;
  }
}

// What the key offset adds to the scores of each row: sm_scale * q . k_offset.
template <class Shape>
__device__ __forceinline__ void compute_score_offsets(const PrefillTask& task, const RowTile& tile, PrefillRow* rows) {
  constexpr int kChunks = Shape::Layout::kChunks, kRowsPerStep = Shape::kThreads / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
#pragma unroll 1
  for (int r = static_cast<int>(threadIdx.x) / kChunks; r < Shape::kBlockRows; r += kRowsPerStep) {
    const int row = tile.first_row + min(r, tile.num_rows - 1), token = token_of_row(task, row);
    const auto* q = task.q.at<const uint16_t>(0, tile.first_token + token, head_of_row(task, tile.kv_head, row, token));
    float sum = 0.f;
    for (int d = 8 * chunk; d < min(8 * chunk + 8, task.head_dim); ++d) {
      RawElement x;
      x.narrow = q[d];
      sum += x.value(task.q_dtype) * task.k_offset.at(tile.kv_head, d);
    }
#pragma unroll
    for (int distance = 1; distance < kChunks; distance *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
    if (chunk == 0) rows[r].offset = sum * task.sm_scale * (task.logits_soft_cap > 0.f ? 1.f : kLog2e);
  }
}

// Brings the block's query rows to shared memory, and what belongs to them.
template <class Shape, class WidenK>
__device__ __forceinline__ void load_queries(const PrefillTask& task, const RowTile& tile, char* queries, PrefillRow* rows) {
  constexpr DType kOperand = WidenK::kIsBf16 ? DType::kBFloat16 : DType::kFloat16;
  __shared__ float units[Shape::kBlockRows];
  const bool are_operands = task.can_copy_rows && task.q_dtype == kOperand && !(score_scale(task, tile.kv_head) < 0.f);
  if (are_operands) {
    copy_queries<Shape>(task, tile, queries);
  } else {
    convert_queries<Shape, WidenK>(task, tile, queries, units);
    __syncthreads();
  }
  const bool has_offsets = has_score_offsets(task);
  if (has_offsets) {
    compute_score_offsets<Shape>(task, tile, rows);
    __syncthreads();
  }
  const int r = static_cast<int>(threadIdx.x);
  if (r < Shape::kBlockRows)
    rows[r] = prefill_row(task, tile, r, (are_operands ? 1.f : units[r]) * WidenK::kFactor, has_offsets ? rows[r].offset : 0.f);
}

// Writes a warp's finished rows, which lie in shared memory in the output's dtype.
template <class Shape>
__device__ __forceinline__ void write_rows(const PrefillTask& task, const RowTile& tile, const char* rows, int first_row,
                                           int lane) {
  constexpr int kChunks = Shape::Layout::kChunks, kRowsPerStep = 32 / kChunks;
  const int chunk = lane % kChunks;
#pragma unroll 4
  for (int r = lane / kChunks; r < Shape::Engine::kRows; r += kRowsPerStep) {
    if (first_row + r >= tile.num_rows || 8 * chunk >= task.head_dim) continue;
    const int row = tile.first_row + first_row + r, token = token_of_row(task, row);
    const uint4 x = *reinterpret_cast<const uint4*>(rows + Shape::Layout::chunk_offset(r, chunk));
    uint16_t* to = task.out.at<uint16_t>(0, tile.first_token + token, head_of_row(task, tile.kv_head, row, token)) + 8 * chunk;
    if (task.can_copy_rows) {
      *reinterpret_cast<uint4*>(to) = x;
    } else {
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
    }
  }
}

template <class KFormat, class VFormat, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerMultiprocessor)
    prefill_kernel(const __grid_constant__ PrefillTask task) {
  extern __shared__ __align__(128) char memory[];
  char* const queries = memory;
  char* const keys = queries + Shape::kQueryBytes;
  auto& notes = *reinterpret_cast<typename Shape::Tiles::Notes*>(keys + Shape::Tiles::kBytes);
  auto* const rows = reinterpret_cast<PrefillRow*>(&notes + 1);
  const int lane = static_cast<int>(threadIdx.x % 32), first_row = static_cast<int>(threadIdx.x / 32) * Shape::Engine::kRows;
  __shared__ RowTile tile;
  overlap_launches();
  if (threadIdx.x == 0) tile.exists = false;
  if (threadIdx.x < 32) {
    __syncwarp();
    find_row_tile(task, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), Shape::kBlockRows,
                  [&](const RowTile& found) { tile = found; });
  }
  __syncthreads();
  if (!tile.exists) return;
  load_queries<Shape, Widen<KFormat>>(task, tile, queries, rows);
  typename Shape::Tiles tiles(task, tile, keys, notes);
  char* const own_rows = queries + first_row * Shape::Layout::kRowBytes;
  __syncthreads();
  typename Shape::Engine engine(task, tile, own_rows, rows + first_row);
#pragma unroll 1
  for (int i = -1; i < tiles.num_tiles(); ++i) {
    const int first_key = tiles.first_key(i);
    if (i >= 0)
      tiles.wait(i,
                 hides_last_keys(rows[0], first_key, Shape::kKeys) || hides_first_keys(rows[Shape::kBlockRows - 1], first_key));
    tiles.start(i + 1);
    if (i >= 0 && engine.sees_tile(first_key)) engine.process(tiles, i);
  }
  wait_copies<0>();
  __syncthreads();  // the rows become the output's: every copy to them has ended, also where there was no tile to wait for
  engine.finish(own_rows, task.q_dtype == DType::kBFloat16, static_scale(task.v_scale, tile.kv_head),
                [&](int r, float maximum, float sum) {
                  const int row = tile.first_row + min(first_row + r, tile.num_rows - 1), token = token_of_row(task, row),
                            head = head_of_row(task, tile.kv_head, row, token);
                  const PrefillRowEnd end = finish_prefill_row(task, rows[first_row + r], head, maximum, sum);
                  if (lane % 4 == 0 && task.lse != nullptr && first_row + r < tile.num_rows)
                    task.lse[static_cast<int64_t>(tile.first_token + token) * task.num_q_heads + head] = end.lse;
                  return end.multiplier;
                });
  write_rows<Shape>(task, tile, own_rows, first_row, lane);
}

}  // namespace quantattn::cuda
