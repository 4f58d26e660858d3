#include "quantattn/prefill.h"

#include "binding/attention_arguments.h"
#include "binding/attention_run.h"
#include "binding/operations.h"

namespace quantattn::binding {
namespace {

constexpr std::string_view kWho = "prefill_attention";

void read_tokens(AttentionArguments& arguments, py::handle q_object, py::handle k_object, py::handle v_object,
                 PrefillParams& params) {
  const Tensor& q = arguments.read_queries(q_object);
  arguments.require_query_shape({kAnySize, kAnySize, kAnySize}, "[T, Hq, D]");
  const Tensor& k = arguments.read_rows(k_object, "k", kAnySize, kAnySize);
  const Tensor& v = arguments.read_rows(v_object, "v", k.shape[0], k.shape[1]);
  params.q = token_vectors(q);
  params.k = token_vectors(k);
  params.v = token_vectors(v);
  params.dtype = require_value_type(q);
  params.num_q_tokens = q.shape[0];
  params.num_k_tokens = k.shape[0];
  params.num_q_heads = to_int(q, 1);
  params.num_kv_heads = to_int(k, 1);
  params.head_dim = to_int(q, 2);
}

void read_sequences(AttentionArguments& arguments, py::handle cu_seqlens_q, py::handle cu_seqlens_k, py::handle seq_starts,
                    PrefillParams& params) {
  params.batch_size = arguments.read_batch_size(cu_seqlens_q, params.cu_seqlens_q);
  params.cu_seqlens_k = cu_seqlens_k.is_none()
                            ? params.cu_seqlens_q
                            : arguments.read_ints(cu_seqlens_k, "cu_seqlens_k", params.batch_size + 1, "[B + 1]");
  if (!seq_starts.is_none()) params.seq_starts = arguments.read_ints(seq_starts, "seq_starts", params.batch_size, "[B]");
}

}  // namespace

void prefill_attention(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse, py::handle cu_seqlens_q,
                       py::handle cu_seqlens_k, py::handle seq_starts, py::handle causal, py::handle sm_scale,
                       py::handle alibi_slopes, py::handle sliding_window, py::handle logits_soft_cap, py::handle sinks) {
  AttentionArguments arguments(kWho, nullptr);
  PrefillParams params;
  read_tokens(arguments, q, k, v, params);
  params.out = token_vectors(arguments.read_out(out));
  params.lse = arguments.read_lse(lse);
  read_sequences(arguments, cu_seqlens_q, cu_seqlens_k, seq_starts, params);
  params.causal = read_bool(causal, kWho, "causal");
  arguments.read_scores({sm_scale, alibi_slopes, sliding_window, logits_soft_cap, sinks}, params.head_dim, params);
  arguments.require_outputs_apart();
  plan_and_run(
      kWho, arguments.query(), [&](const Execution& execution) { return plan_prefill_attention(params, execution); },
      [&](const Execution& execution, const PrefillPlan& plan, Workspace workspace) {
        quantattn::prefill_attention(params, execution, plan, workspace.scratch);
      });
}

}  // namespace quantattn::binding
