#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "options.h"
#include "quantattn/types.h"
#include "row_source.h"

namespace sample_runner {

// One attention problem, before any cache format is chosen. Shapes: B, T, Hq, Hkv, D as in quantattn/hybrid.h.
struct Problem {
  int batch_size = 0, num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::vector<bool> is_prefill;       // [B]: the sequence has a prompt's query tokens, not the one or few of a decode step
  std::vector<int32_t> cu_seqlens_q;  // [B + 1] first query token of each sequence, then T
  std::vector<int32_t> seq_lens;      // [B]
  std::vector<int32_t> seq_starts;    // [B]; empty: 0
  bool is_causal = true;
  quantattn::DType q_dtype = quantattn::DType::kFloat16;
  std::vector<std::byte> q;  // [T, Hq, D], q_dtype
  RowSource k, v;
  float sm_scale = 0.f;
  std::vector<float> alibi_slopes;  // [Hq] or [B, Hq]; empty: none
  std::vector<float> sinks;         // [Hq]; empty: none
  int sliding_window = 0;
  float logits_soft_cap = 0.f;

  int64_t num_q_tokens() const { return cu_seqlens_q.back(); }
  int64_t num_q_rows() const { return num_q_tokens() * num_q_heads; }
  int num_q_tokens_of(int b) const { return cu_seqlens_q[static_cast<size_t>(b) + 1] - cu_seqlens_q[static_cast<size_t>(b)]; }
  // Of query token `token` of sequence b.
  int64_t row(int b, int64_t token, int head) const {
    return (cu_seqlens_q[static_cast<size_t>(b)] + token) * num_q_heads + head;
  }
  int max_seq_len() const;
  // From the slopes of one sequence to those of the next; 0 where all share one row.
  int64_t alibi_row_stride() const { return alibi_slopes.size() > static_cast<size_t>(num_q_heads) ? num_q_heads : 0; }
};

// The keys [first, last) that query token `token` of sequence b sees; first >= last where it sees none.
struct VisibleKeys {
  int64_t position, first, last;  // the token's own position among the keys, negative where there are fewer keys than tokens
};
VisibleKeys visible_keys(const Problem& problem, int b, int64_t token);

// Loads or generates everything that the command line asks for. Throws UsageError where files and sizes do not fit.
Problem make_problem(const Options& options);

}  // namespace sample_runner
