#pragma once

#include "quantattn/api.h"
#include "quantattn/types.h"

namespace quantattn {

// Attention of whole prompts over K and V that no cache holds yet, by the algorithm of FlashAttention-2 (Dao,
// arXiv:2307.08691). Sequences of unequal lengths lie one after another along the token axis.
// Shapes: B = batch_size, T = num_q_tokens and S = num_k_tokens of all sequences together, Hq = num_q_heads,
// H = num_kv_heads, D = head_dim.
// Query token i of the n query tokens of a sequence with L keys stands at position p = L - n + i and sees key j iff
// seq_starts[b] <= j < L, with `causal` j <= p, and with a window W p - j < W.
struct PrefillParams {
  VectorArray q;         // [1, T, Hq, D], dtype
  VectorArray k, v;      // [1, S, H, D], dtype
  VectorArray out;       // [1, T, Hq, D], dtype; must not overlap any input
  float* lse = nullptr;  // [T, Hq] contiguous, natural log, -inf where nothing is visible; may be null
  DType dtype = DType::kFloat32;
  int batch_size = 0, num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
  int64_t num_q_tokens = 0, num_k_tokens = 0;
  Strided1D<const int32_t> cu_seqlens_q;  // [B + 1] first query token of each sequence, then T; never decreasing
  Strided1D<const int32_t> cu_seqlens_k;  // [B + 1] first key of each sequence, then S; never decreasing
  Strided1D<const int32_t> seq_starts;    // [B] first visible key; not given: 0

  bool causal = true;
  float sm_scale = 0.f;                 // multiplies q.k before the softmax, usually 1/sqrt(D)
  Strided2D<const float> alibi_slopes;  // [B, Hq] (row stride 0 for one row); not given: no ALiBi
  Strided1D<const float> sinks;         // [Hq] logits that join the denominator; not given: none
  int sliding_window = 0;               // keys per query token, itself included; 0: unlimited
  float logits_soft_cap = 0.f;          // cap * tanh(s / cap); 0: none
};

struct PrefillPlan {
  std::string_view backend;     // "cpu", "cuda"
  std::string_view variant;     // "avx2", "tensor_cores", ...
  int64_t workspace_bytes = 0;  // scratch of the run, any content; 0 allowed
};

// Checks the arguments and sizes the workspace. On a CPU it reads the lengths; on CUDA it reads only host values, so it never
// synchronises. Throws InvalidArgument or Unsupported. A row's result never depends on the rest of the batch.
QATTN_API PrefillPlan plan_prefill_attention(const PrefillParams& params, const Execution& execution);

// Runs a plan made for the same arguments; `scratch` holds plan.workspace_bytes, 256-byte aligned, any content.
QATTN_API void prefill_attention(const PrefillParams& params, const Execution& execution, const PrefillPlan& plan,
                                 void* scratch);

}  // namespace quantattn
