#pragma once

#include "core/backend.h"

namespace quantattn::cpu {

// Keys [first, end) of a sequence; empty where end <= first.
struct KeyRange {
  int64_t first, end;
};

// One sequence of a batch.
struct Sequence {
  int64_t q_outer, q_token;  // indices of its first query token in q and out
  int64_t lse_token;         // index of its first query token in lse
  int num_q_tokens;
  int64_t length, start;  // keys, and the first visible one
  int64_t first_key;      // where its keys start in their pages
};

// What calls of decode, prefill and hybrid attention have in common, as the kernels see it: a ragged batch of query tokens,
// and the keys and values of each sequence. Fresh keys and values lie as in a cache of one page that all sequences share.
struct AttentionBatch {
  VectorArray q, out;  // [.., T, Hq, D], q_dtype
  float* lse;          // may be null
  DType q_dtype;
  int batch_size, num_q_heads;
  int num_q_tokens;                       // of every sequence, unless cu_seqlens_q is given
  Strided1D<const int32_t> cu_seqlens_q;  // [B + 1]

  KvCacheView cache;             // of fresh rows only layout and sizes
  int key_stages, value_stages;  // rows of Isa::formats
  int key_bytes, value_bytes;    // of an element
  Strided2D<const int32_t> page_table;
  Strided1D<const int32_t> seq_lens;      // [B], unless cu_seqlens_k is given
  Strided1D<const int32_t> cu_seqlens_k;  // [B + 1]
  Strided1D<const int32_t> seq_starts;

  bool causal;
  float sm_scale;
  Strided2D<const float> alibi_slopes;
  Strided1D<const float> sinks;
  int sliding_window;
  float logits_soft_cap;

  // Whether a query row needs what a key offset adds to its scores: a constant leaves the softmax alone, but not the soft
  // cap, sinks and the log-sum-exp.
  bool has_score_offsets() const { return cache.k_offset && (logits_soft_cap > 0.f || sinks || lse); }
  int group() const { return num_q_heads / cache.num_kv_heads; }
  Sequence sequence(int64_t b) const;
  // Keys that query token `i` of a sequence sees. Neither end moves down from one token to the next.
  KeyRange visible_to(const Sequence& sequence, int64_t i) const;
  // Keys that any of `num_tokens` query tokens from `first` on sees.
  KeyRange visible_to(const Sequence& sequence, int64_t first, int64_t num_tokens) const {
    return {visible_to(sequence, first).first, visible_to(sequence, first + num_tokens - 1).end};
  }
};

AttentionBatch batch_of(const DecodeParams& params);
AttentionBatch batch_of(const HybridParams& params);
AttentionBatch batch_of(const PrefillParams& params);

}  // namespace quantattn::cpu
