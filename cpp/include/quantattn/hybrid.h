#pragma once

#include "quantattn/decode.h"

namespace quantattn {

// One ragged batch over a cache: sequences with no, one, few or many query tokens in any order, each computed by the kernel
// that suits it. The cache holds the query tokens' K and V already, so a prompt may come in chunks.
// Shapes: B = batch_size, T = num_q_tokens of all sequences together, Hq = num_q_heads, D = head_dim.
// Query token i of the n query tokens of a sequence of length L stands at position p = L - n + i and sees key j iff
// seq_starts[b] <= j < L, with `causal` j <= p, and with a window W p - j < W.
struct HybridParams {
  VectorArray q;         // [1, T, Hq, D], q_dtype
  VectorArray out;       // [1, T, Hq, D], q_dtype; must not overlap any input
  float* lse = nullptr;  // [T, Hq] contiguous, natural log, -inf where nothing is visible; may be null
  DType q_dtype = DType::kFloat32;
  int batch_size = 0, num_q_heads = 0;
  int64_t num_q_tokens = 0;
  Strided1D<const int32_t> cu_seqlens_q;  // [B + 1] first query token of each sequence, then T; never decreasing

  KvCacheView cache;
  Strided2D<const int32_t> page_table;  // [B, max_pages] page ids; not given: sequence b owns page b
  int max_pages = 1;                    // columns of page_table
  Strided1D<const int32_t> seq_lens;    // [B] tokens in the cache, the query tokens included; 0 allowed
  Strided1D<const int32_t> seq_starts;  // [B] first visible key; not given: 0

  bool causal = true;
  float sm_scale = 0.f;                 // multiplies q.k before the softmax, usually 1/sqrt(D)
  Strided2D<const float> alibi_slopes;  // [B, Hq] (row stride 0 for one row); not given: no ALiBi
  Strided1D<const float> sinks;         // [Hq] logits that join the denominator; not given: none
  int sliding_window = 0;               // keys per query token, itself included; 0: unlimited
  float logits_soft_cap = 0.f;          // cap * tanh(s / cap); 0: none

  int num_splits = 0;            // parts the KV axis of a sequence is cut into; 0: chosen
  bool batch_invariant = false;  // fixed split size: a row's result does not depend on the rest of the batch
};

struct HybridPlan {
  std::string_view backend;     // "cpu", "cuda"
  std::string_view variant;     // "avx2", "tensor_cores", ...
  int num_splits = 1;           // most parts that one sequence is cut into
  int split_size = 0;           // tokens per part; 0 where the kernel decides on the device
  int64_t workspace_bytes = 0;  // scratch of the run, any content; 0 allowed
  int64_t counter_bytes = 0;    // arrival counters of the run; 0 on a CPU
};

// Checks the arguments and chooses kernels and splits. On a CPU it reads lengths and live page ids; on CUDA it reads only
// host values, so it never synchronises. Throws InvalidArgument or Unsupported.
QATTN_API HybridPlan plan_hybrid_attention(const HybridParams& params, const Execution& execution);

// Runs a plan made for the same arguments (on a CUDA device lengths, tables and values may have changed since).
QATTN_API void hybrid_attention(const HybridParams& params, const Execution& execution, const HybridPlan& plan,
                                Workspace workspace);

}  // namespace quantattn
