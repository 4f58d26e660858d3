#pragma once

#include "decode/task.h"

// What the host hands to a prefill kernel.
//
// Rows: the query vectors of one sequence that share a KV head, row r being query token r / group_size of head
// r % group_size of the group, so that heads of a group share every key that is read.
// Row tile: the consecutive rows that one block computes; the last one of a sequence is padded.
// Key tile: the keys that a block multiplies with its rows at a time.
namespace quantattn::cuda {

struct PrefillTask {
  VectorArray q, out;  // [1, T, Hq, D], 16-bit
  float* lse;          // [T, Hq] or null
  DType q_dtype;
  int batch_size, num_q_heads, head_dim;
  int num_q_tokens, num_k_tokens;         // T, S (S where there are cu_seqlens_k)
  FastDivide group_size;                  // query heads per KV head
  Strided1D<const int32_t> cu_seqlens_q;  // [B + 1]
  int fewest_tokens;                      // sequences with fewer query tokens are left alone

  // Key j of sequence b: token cu_seqlens_k[b] + j of page 0 where there are cu_seqlens_k, else token j % page_size of page
  // page_table[b][j / page_size], or of page b where there is no page table.
  CodeAddresses k, v;
  ScaleView k_scale, v_scale;
  Strided2D<const float> k_offset;  // [H, D] or null
  int64_t num_pages;
  Strided1D<const int32_t> cu_seqlens_k;  // [B + 1] or null
  Strided1D<const int32_t> seq_lens;      // [B], where cu_seqlens_k is null
  Strided1D<const int32_t> seq_starts;    // [B] or null: 0
  Strided2D<const int32_t> page_table;
  FastDivide page_size;
  int capacity;  // tokens that a row of the page table can address

  bool causal;
  float sm_scale;
  Strided2D<const float> alibi_slopes;
  Strided1D<const float> sinks;
  int sliding_window;
  float logits_soft_cap;
  bool can_copy_rows;  // query and output rows lie at multiples of 16 bytes
};

// One compiled prefill kernel.
struct PrefillInstance {
  int head_dim;    // padded
  int block_rows;  // of a row tile
  int threads, shared_bytes;
  void (*entry)(PrefillTask);
};

}  // namespace quantattn::cuda
