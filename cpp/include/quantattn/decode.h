#pragma once

#include "quantattn/kv_cache.h"

namespace quantattn {

inline constexpr int kMaxDecodeTokens = 16;

// Shapes: B = batch_size, n = num_q_tokens, Hq = num_q_heads, D = head_dim.
// Query token i of a sequence of length L stands at position p = L - n + i and sees key j iff
// seq_starts[b] <= j <= p and, with a window W, p - j < W.
struct DecodeParams {
  VectorArray q;         // [B, n, Hq, D], q_dtype
  VectorArray out;       // [B, n, Hq, D], q_dtype; must not overlap any input
  float* lse = nullptr;  // [B, n, Hq] contiguous, natural log, -inf where nothing is visible; may be null
  DType q_dtype = DType::kFloat32;
  int batch_size = 0, num_q_tokens = 1, num_q_heads = 0;

  KvCacheView cache;
  Strided2D<const int32_t> page_table;  // [B, max_pages] page ids; not given: sequence b owns page b
  int max_pages = 1;                    // columns of page_table
  Strided1D<const int32_t> seq_lens;    // [B] tokens in the cache, the n query tokens included; 0 allowed
  Strided1D<const int32_t> seq_starts;  // [B] first visible key; not given: 0

  float sm_scale = 0.f;                 // multiplies q.k before the softmax, usually 1/sqrt(D)
  Strided2D<const float> alibi_slopes;  // [B, Hq] (row stride 0 for one row); not given: no ALiBi
  Strided1D<const float> sinks;         // [Hq] logits that join the denominator; not given: none
  int sliding_window = 0;               // keys per query token, itself included; 0: unlimited
  float logits_soft_cap = 0.f;          // cap * tanh(s / cap); 0: none

  int num_splits = 0;            // parts the KV axis is cut into; 0: chosen
  bool batch_invariant = false;  // fixed split size: a row's result does not depend on the rest of the batch
};

struct DecodeKernel;  // a row of the kernel registry

// What a call will run: the planner is pure, so its choice can be printed and forced.
struct DecodePlan {
  const DecodeKernel* kernel = nullptr;
  std::string_view backend;     // "cpu", "cuda"
  std::string_view variant;     // "avx2", "tensor_cores", ...
  int num_splits = 1;           // most parts that one sequence is cut into
  int split_size = 0;           // tokens per part; 0 where the kernel decides on the device
  int64_t workspace_bytes = 0;  // scratch of the run, any content; 0 allowed
  int64_t counter_bytes = 0;    // arrival counters of the run; 0 on a CPU
};

struct Workspace {
  void* scratch = nullptr;   // plan.workspace_bytes, 256-byte aligned, any content
  void* counters = nullptr;  // plan.counter_bytes, zeroed once; every run leaves zeros. One concurrent run at a time
};

// Checks the arguments and chooses kernel and splits. On a CPU it reads lengths and live page ids; on CUDA it reads only
// host values, so it never synchronises. Throws InvalidArgument or Unsupported.
QATTN_API DecodePlan plan_decode_attention(const DecodeParams& params, const Execution& execution);

// Runs a plan made for the same arguments (on a CUDA device lengths, tables and values may have changed since).
QATTN_API void decode_attention(const DecodeParams& params, const Execution& execution, const DecodePlan& plan,
                                Workspace workspace);

}  // namespace quantattn
