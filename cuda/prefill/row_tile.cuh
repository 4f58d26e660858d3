#pragma once

#include "decode/ptx.cuh"
#include "prefill/task.h"

// Which rows a block computes and which keys they see. Every block finds that out for itself from the lengths, so a captured
// graph is right on every replay.
namespace quantattn::cuda {

// A half-open range of tokens. Whatever the ends in memory say, it lies within the tensor.
struct TokenRange {
  int begin, size;

  __device__ __forceinline__ TokenRange(int begin, int size) : begin(begin), size(size) {}
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

// What a lane reads of its sequence: all at once, since every read waits for memory.
struct SequenceLengths {
  TokenRange tokens, keys;  // of the batch; a cache numbers the keys of every sequence from 0
  int start;

  __device__ __forceinline__ SequenceLengths(const PrefillTask& task, int sequence)
      : tokens(task.cu_seqlens_q, sequence, task.num_q_tokens),
        keys(task.cu_seqlens_k ? TokenRange(task.cu_seqlens_k, sequence, task.num_k_tokens)
                               : TokenRange{0, min(max(task.seq_lens[sequence], 0), task.capacity)}),
        start(task.seq_starts ? max(task.seq_starts[sequence], 0) : 0) {}
};

__device__ __forceinline__ RowTile row_tile(const PrefillTask& task, const SequenceLengths& lengths, int sequence, int kv_head,
                                            int first_row, int block_rows) {
  RowTile tile;
  tile.exists = true;
  tile.sequence = sequence;
  tile.kv_head = kv_head;
  tile.first_token = lengths.tokens.begin;
  tile.num_tokens = lengths.tokens.size;
  tile.first_row = first_row;
  tile.num_rows = min(block_rows, tile.num_tokens * static_cast<int>(task.group_size.divisor) - first_row);
  tile.first_cached_token = lengths.keys.begin;
  tile.length = lengths.keys.size;
  tile.start = lengths.start;
  const int first_position = tile.first_position() + token_of_row(task, first_row),
            last_position = tile.first_position() + token_of_row(task, first_row + tile.num_rows - 1);
  tile.first_key = tile.start;
  if (task.sliding_window > 0) tile.first_key = max(tile.first_key, first_position + 1 - task.sliding_window);
  tile.end_key = task.causal ? min(tile.length, last_position + 1) : tile.length;
  return tile;
}

// A warp finds tile `index` of all row tiles of a KV head, if it exists; one lane calls found(tile). The last rows of a
// sequence, which see the most keys where attention is causal, come first.
template <class Found>
__device__ __forceinline__ void find_row_tile(const PrefillTask& task, int index, int kv_head, int block_rows,
                                              const Found& found) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int first = 0; first < task.batch_size; first += 32) {
    const int sequence = min(first + lane, task.batch_size - 1);
    const SequenceLengths lengths(task, sequence);
    const int rows = lengths.tokens.size * static_cast<int>(task.group_size.divisor);
    const bool counts = first + lane < task.batch_size && lengths.tokens.size >= task.fewest_tokens;
    const int num_tiles = counts ? (rows + block_rows - 1) / block_rows : 0;
    int end = num_tiles;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(0xFFFFFFFFu, end, distance);
      if (lane >= distance) end += below;
    }
    if (index < end && index >= end - num_tiles)
      found(row_tile(task, lengths, sequence, kv_head, (end - 1 - index) * block_rows, block_rows));
    const int all = __shfl_sync(0xFFFFFFFFu, end, 31);
    if (index < all) return;
    index -= all;
  }
}

}  // namespace quantattn::cuda
