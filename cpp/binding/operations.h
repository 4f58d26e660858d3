#pragma once

#include "binding/cache_handle.h"

// What Python calls. Tensors come as objects and are checked here; outputs are written in place.
// Shapes: B = batch_size, n = num_q_tokens, Hq = num_q_heads, H = num_kv_heads, D = head_dim; T = query tokens
// or tokens to append, S = keys, of all sequences together.
namespace quantattn::binding {

// q, out [B, Hq, D] or [B, n, Hq, D]; lse float32 [B, Hq] or [B, n, Hq], or None; the rest as pyquantattn.decode_attention.
void decode_attention(const CacheHandle& cache, py::handle q, py::handle out, py::handle lse, py::handle seq_lens,
                      py::handle page_table, py::handle seq_starts, py::handle sm_scale, py::handle alibi_slopes,
                      py::handle sliding_window, py::handle logits_soft_cap, py::handle sinks, py::handle num_splits,
                      py::handle batch_invariant);

// q, out [T, Hq, D]; k, v [S, H, D]; lse float32 [T, Hq], or None; the rest as pyquantattn.prefill_attention.
void prefill_attention(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse, py::handle cu_seqlens_q,
                       py::handle cu_seqlens_k, py::handle seq_starts, py::handle causal, py::handle sm_scale,
                       py::handle alibi_slopes, py::handle sliding_window, py::handle logits_soft_cap, py::handle sinks);

// q, out [T, Hq, D]; lse float32 [T, Hq], or None; the rest as pyquantattn.hybrid_attention.
void hybrid_attention(const CacheHandle& cache, py::handle q, py::handle out, py::handle lse, py::handle cu_seqlens_q,
                      py::handle seq_lens, py::handle page_table, py::handle seq_starts, py::handle causal, py::handle sm_scale,
                      py::handle alibi_slopes, py::handle sliding_window, py::handle logits_soft_cap, py::handle sinks,
                      py::handle num_splits, py::handle batch_invariant);

// k, v [T, H, D]; slot_mapping int64 [T].
void append_kv(const CacheHandle& cache, py::handle k, py::handle v, py::handle slot_mapping);

// values, codes [..., H, D] of 2 to 4 dimensions; scale float32 [] or [H], float16 [..., H], or None; offset float32 [H, D],
// or None.
void quantize_kv(py::handle values, py::handle codes, py::handle scale, py::handle offset);
void dequantize_kv(py::handle codes, py::handle scale, py::handle offset, py::handle values);

// out_a, out_b, out [B, H, D] or [B, n, H, D]; lse_a, lse_b, lse float32 of the same shape without D.
void merge_states(py::handle out_a, py::handle lse_a, py::handle out_b, py::handle lse_b, py::handle out, py::handle lse);

void define_runtime(py::module_& module);

}  // namespace quantattn::binding
