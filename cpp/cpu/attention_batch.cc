#include "cpu/attention_batch.h"

#include <algorithm>

#include "cpu/isa_table.h"

namespace quantattn::cpu {
namespace {

template <class Params>
AttentionBatch common_part(const Params& p) {
  AttentionBatch batch{};
  batch.q = p.q;
  batch.out = p.out;
  batch.lse = p.lse;
  batch.batch_size = p.batch_size;
  batch.num_q_heads = p.num_q_heads;
  batch.seq_starts = p.seq_starts;
  batch.causal = true;
  batch.sm_scale = p.sm_scale;
  batch.alibi_slopes = p.alibi_slopes;
  batch.sinks = p.sinks;
  batch.sliding_window = p.sliding_window;
  batch.logits_soft_cap = p.logits_soft_cap;
  return batch;
}

template <class Params>
AttentionBatch cached_part(const Params& p) {
  AttentionBatch batch = common_part(p);
  batch.q_dtype = p.q_dtype;
  batch.cache = p.cache;
  batch.key_stages = static_cast<int>(p.cache.format.k);
  batch.value_stages = static_cast<int>(p.cache.format.v);
  batch.key_bytes = code_bytes(p.cache.format.k);
  batch.value_bytes = code_bytes(p.cache.format.v);
  batch.page_table = p.page_table;
  batch.seq_lens = p.seq_lens;
  return batch;
}

}  // namespace

AttentionBatch batch_of(const DecodeParams& p) {
  AttentionBatch batch = cached_part(p);
  batch.num_q_tokens = p.num_q_tokens;
  return batch;
}

AttentionBatch batch_of(const HybridParams& p) {
  AttentionBatch batch = cached_part(p);
  batch.cu_seqlens_q = p.cu_seqlens_q;
  batch.causal = p.causal;
  return batch;
}

AttentionBatch batch_of(const PrefillParams& p) {
  AttentionBatch batch = common_part(p);
  batch.q_dtype = p.dtype;
  batch.cu_seqlens_q = p.cu_seqlens_q;
  batch.cu_seqlens_k = p.cu_seqlens_k;
  batch.causal = p.causal;
  batch.cache.k_codes = {p.k.data, 0, p.k.token_stride, p.k.head_stride};
  batch.cache.v_codes = {p.v.data, 0, p.v.token_stride, p.v.head_stride};
  batch.cache.num_pages = 1;
  batch.cache.page_size = std::max(1, static_cast<int>(p.num_k_tokens));
  batch.cache.num_kv_heads = p.num_kv_heads;
  batch.cache.head_dim = p.head_dim;
  batch.key_stages = batch.value_stages = stages_of(p.dtype);
  batch.key_bytes = batch.value_bytes = bytes_of(p.dtype);
  return batch;
}

Sequence AttentionBatch::sequence(int64_t b) const {
  Sequence found{};
  if (cu_seqlens_q) {
    found.q_token = found.lse_token = cu_seqlens_q[b];
    found.num_q_tokens = cu_seqlens_q[b + 1] - cu_seqlens_q[b];
  } else {
    found.q_outer = b;
    found.lse_token = b * num_q_tokens;
    found.num_q_tokens = num_q_tokens;
  }
  found.first_key = cu_seqlens_k ? cu_seqlens_k[b] : 0;
  found.length = cu_seqlens_k ? cu_seqlens_k[b + 1] - cu_seqlens_k[b] : seq_lens[b];
  found.start = seq_starts ? seq_starts[b] : 0;
  return found;
}

KeyRange AttentionBatch::visible_to(const Sequence& sequence, int64_t i) const {
  const int64_t position = sequence.length - sequence.num_q_tokens + i;
  int64_t first = sequence.start;
  if (sliding_window > 0) first = std::max(first, position - sliding_window + 1);
  return {first, causal ? position + 1 : sequence.length};
}

}  // namespace quantattn::cpu
