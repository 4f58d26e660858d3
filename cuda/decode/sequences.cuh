#pragma once

#include "decode/ptx.cuh"
#include "decode/task.h"

// What a decoding kernel knows of a sequence: its query tokens, the keys that they see, and its items.
namespace quantattn::cuda {

// The query tokens of a sequence, and the rows that they make with each KV head.
struct QueryRange {
  int first_token, num_tokens;  // of q; in a ragged batch from the first sequence's on
  int num_rows;                 // 0 where the launch leaves the sequence alone
};

__device__ __forceinline__ QueryRange queries_of(const auto& task, int sequence) {
  if (!task.is_ragged()) return {0, task.params.num_q_tokens, task.num_rows};
  // Whatever the lengths say, no row lies outside q.
  const int first = min(max(task.cu_seqlens_q[sequence], 0), task.total_tokens);
  const int count = min(task.cu_seqlens_q[sequence + 1], task.total_tokens) - first;
  const bool is_served = count >= task.fewest_tokens && count <= task.most_tokens;
  const int num_rows = is_served ? count * static_cast<int>(task.group_size.divisor) : 0;
  return {first, count, num_rows};
}

__device__ __forceinline__ int items_of(const auto& task, int sequence) {
  const int each = static_cast<int>(task.items_per_sequence.divisor);
  if (!task.is_ragged()) return each;
  const int num_row_tiles = (queries_of(task, sequence).num_rows + (1 << task.rows_log2) - 1) >> task.rows_log2;
  return num_row_tiles * each;
}

__device__ __forceinline__ int columns_per_block(const auto& task) { return 1 << task.columns_log2; }
__device__ __forceinline__ int own_column(const auto& task) { return warp_index() & (columns_per_block(task) - 1); }

// An item, where its tiles lie in the numbering of all tiles (kEqualRanges) or of its own, and one of its columns.
struct Item {
  unsigned first_tile;
  int num_tiles;
  int sequence, index;  // of the item in its sequence
  int kv_head, row_tile;

  __device__ __forceinline__ void set_column(const auto& task, int column_in_item) {
    const unsigned column = static_cast<unsigned>((index << task.columns_log2) + column_in_item);
    const unsigned quotient = task.columns_divisor.quotient(column);
    const unsigned remainder = column - quotient * task.columns_divisor.divisor;
    kv_head = static_cast<int>(task.is_ragged() ? remainder : quotient);
    row_tile = static_cast<int>(task.is_ragged() ? quotient : remainder);
  }
};

// The keys that some of a sequence's query tokens see, and the tiles that cover them.
struct SequenceSpan {
  int first_key, end_key;      // [first_key, end_key), empty where end_key <= first_key
  int first_tile, num_tiles;   // num_tiles >= 1
  int whole_begin, whole_end;  // every query token of the sequence sees the keys [whole_begin, whole_end)

  __device__ __forceinline__ int first_position(const auto& task, const QueryRange& queries) const {
    return task.is_causal() ? whole_end - 1 : whole_end - queries.num_tokens;
  }
};

// Of `num_tokens` query tokens from the sequence's `first_index`-th on.
__device__ __forceinline__ SequenceSpan span_of(const auto& task, int sequence, int all_tokens, int first_index,
                                                int num_tokens) {
  const DecodeParams& p = task.params;
  const int length = min(max(p.seq_lens[sequence], 0), task.capacity);
  const int first_position = length - all_tokens + first_index;
  const int start = p.seq_starts ? max(p.seq_starts[sequence], 0) : 0;
  const int first = p.sliding_window > 0 ? max(start, first_position + 1 - p.sliding_window) : start;
  SequenceSpan span;
  span.end_key = task.is_causal() ? max(0, min(length, first_position + num_tokens)) : length;
  span.first_key = min(first, span.end_key);
  span.whole_begin = p.sliding_window > 0 ? max(start, length - p.sliding_window) : start;
  span.whole_end = task.is_causal() ? length - all_tokens + 1 : length;
  span.first_tile = span.first_key / kTileTokens;
  span.num_tiles = max(1, (span.end_key + kTileTokens - 1) / kTileTokens - span.first_tile);
  return span;
}

__device__ __forceinline__ SequenceSpan span_of(const auto& task, int sequence) {
  const QueryRange queries = queries_of(task, sequence);
  return span_of(task, sequence, queries.num_tokens, 0, queries.num_tokens);
}

// Of the query tokens of an item's rows, in a ragged batch.
__device__ __forceinline__ SequenceSpan span_of_item(const auto& task, Item item) {
  const QueryRange queries = queries_of(task, item.sequence);
  item.set_column(task, 0);  // all columns of the item have the same row tile
  const unsigned first_row = static_cast<unsigned>(item.row_tile) << task.rows_log2;
  const unsigned last_row = min(first_row + (1u << task.rows_log2), static_cast<unsigned>(queries.num_rows)) - 1;
  const int first_index = static_cast<int>(task.group_size.quotient(first_row));
  const int num_tokens = static_cast<int>(task.group_size.quotient(last_row)) + 1 - first_index;
  return span_of(task, item.sequence, queries.num_tokens, first_index, num_tokens);
}

}  // namespace quantattn::cuda
