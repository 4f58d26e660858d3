#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "options.h"
#include "quantattn/types.h"
#include "row_source.h"

namespace sample_runner {

// One attention problem, before any cache format is chosen. Shapes: B, n, Hq, Hkv, D as in quantattn/decode.h.
struct Problem {
  int batch_size = 0, num_q_tokens = 0, num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::vector<int32_t> seq_lens;    // [B]
  std::vector<int32_t> seq_starts;  // [B]; empty: 0
  quantattn::DType q_dtype = quantattn::DType::kFloat16;
  std::vector<std::byte> q;  // [B, n, Hq, D], q_dtype
  RowSource k, v;
  float sm_scale = 0.f;
  std::vector<float> alibi_slopes;  // [Hq] or [B, Hq]; empty: none
  std::vector<float> sinks;         // [Hq]; empty: none
  int sliding_window = 0;
  float logits_soft_cap = 0.f;

  int64_t num_q_rows() const { return int64_t{batch_size} * num_q_tokens * num_q_heads; }
  int max_seq_len() const;
  // From the slopes of one sequence to those of the next; 0 where all share one row.
  int64_t alibi_row_stride() const { return alibi_slopes.size() > static_cast<size_t>(num_q_heads) ? num_q_heads : 0; }
};

// Loads or generates everything that the command line asks for. Throws UsageError where files and sizes do not fit.
Problem make_problem(const Options& options);

}  // namespace sample_runner
