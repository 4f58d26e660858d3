#pragma once

#include "decode/ptx.cuh"
#include "prefill/task.h"

// Which rows a block computes and which keys they see. Every block finds that out for itself from the lengths, so a captured
// graph is right on every replay.
namespace quantattn::cuda {

// A half-open range of tokens. Whatever the ends in memory say, it lies within the tensor.
struct TokenRange {
  int begin, size;

  __device__ __forceinline__ TokenRange(const Strided1D<const int32_t>& cu_seqlens, int sequence, int num_tokens) {
    begin = min(max(cu_seqlens[sequence], 0), num_tokens);
    size = max(min(cu_seqlens[sequence + 1], num_tokens) - begin, 0);
  }
};

struct RowTile {
  bool exists;
  int sequence, kv_head;
  int first_token, num_tokens;  // of the sequence, in the batch's numbering
  int first_row, num_rows;      // of the tile, in the sequence's numbering
  int first_cached_token;       // token of key 0 in page 0, where keys are not in a cache
  int length;                   // keys of the sequence
  int start;                    // first key that any query token may see
  int first_key, end_key;       // [first_key, end_key) holds every key that some row sees; empty: end_key <= first_key

  __device__ __forceinline__ int first_position() const { return length - num_tokens; }  // of the sequence's query tokens
};

__device__ __forceinline__ int token_of_row(const PrefillTask& task, int row) {
  return static_cast<int>(task.group_size.quotient(static_cast<unsigned>(row)));
}

// Rows of a sequence that share a KV head; none where its query tokens are left to others.
__device__ __forceinline__ int num_rows_of(const PrefillTask& task, int sequence) {
  const int num_tokens = TokenRange(task.cu_seqlens_q, sequence, task.num_q_tokens).size;
  return num_tokens < task.fewest_tokens ? 0 : num_tokens * static_cast<int>(task.group_size.divisor);
}

// The keys that the rows of a tile see.
__device__ __forceinline__ void find_keys(const PrefillTask& task, RowTile& tile) {
  if (task.cu_seqlens_k) {
    const TokenRange keys(task.cu_seqlens_k, tile.sequence, task.num_k_tokens);
    tile.first_cached_token = keys.begin;
    tile.length = keys.size;
  } else {
    tile.length = min(max(task.seq_lens[tile.sequence], 0), task.capacity);
  }
  const int first_position = tile.first_position() + token_of_row(task, tile.first_row),
            last_position = tile.first_position() + token_of_row(task, tile.first_row + tile.num_rows - 1);
  tile.start = task.seq_starts ? max(task.seq_starts[tile.sequence], 0) : 0;
  tile.first_key = tile.start;
  if (task.sliding_window > 0) tile.first_key = max(tile.first_key, first_position + 1 - task.sliding_window);
  tile.end_key = task.causal ? min(tile.length, last_position + 1) : tile.length;
}

// A warp finds tile `index` of all row tiles of a KV head, for its whole block. The last rows of a sequence, which see the most
// keys where attention is causal, come first.
__device__ __forceinline__ void find_row_tile(const PrefillTask& task, int index, int kv_head, int block_rows, RowTile& found) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  RowTile tile = {};
  tile.kv_head = kv_head;
  for (int first = 0; first < task.batch_size && !tile.exists; first += 32) {
    const int rows = first + lane < task.batch_size ? num_rows_of(task, first + lane) : 0;
    int scan = (rows + block_rows - 1) / block_rows;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(0xFFFFFFFFu, scan, distance);
      if (lane >= distance) scan += below;
    }
    const unsigned beyond = __ballot_sync(0xFFFFFFFFu, scan > index);
    if (beyond == 0) {
      index -= __shfl_sync(0xFFFFFFFFu, scan, 31);
      continue;
    }
    const int holder = __ffs(static_cast<int>(beyond)) - 1;
    tile.exists = true;
    tile.sequence = first + holder;
    tile.first_row = (__shfl_sync(0xFFFFFFFFu, scan, holder) - 1 - index) * block_rows;
    tile.num_rows = min(block_rows, __shfl_sync(0xFFFFFFFFu, rows, holder) - tile.first_row);
  }
  if (tile.exists) {
    const TokenRange tokens(task.cu_seqlens_q, tile.sequence, task.num_q_tokens);
    tile.first_token = tokens.begin;
    tile.num_tokens = tokens.size;
    find_keys(task, tile);
  }
  if (lane == 0) found = tile;
}

}  // namespace quantattn::cuda
