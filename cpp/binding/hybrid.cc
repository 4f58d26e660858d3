#include "quantattn/hybrid.h"

#include "binding/attention_arguments.h"
#include "binding/attention_run.h"
#include "binding/operations.h"

namespace quantattn::binding {
namespace {

constexpr std::string_view kWho = "hybrid_attention";

void read_queries(AttentionArguments& arguments, py::handle q_object, py::handle cu_seqlens_q, HybridParams& params) {
  const Tensor& q = arguments.read_queries(q_object);
  arguments.require_query_shape({kAnySize, kAnySize, params.cache.head_dim}, "[T, Hq, D]");
  params.q = token_vectors(q);
  params.q_dtype = require_value_type(q);
  params.num_q_tokens = q.shape[0];
  params.num_q_heads = to_int(q, 1);
  params.batch_size = arguments.read_batch_size(cu_seqlens_q, params.cu_seqlens_q);
}

}  // namespace

void hybrid_attention(const CacheHandle& cache, py::handle q, py::handle out, py::handle lse, py::handle cu_seqlens_q,
                      py::handle seq_lens, py::handle page_table, py::handle seq_starts, py::handle causal, py::handle sm_scale,
                      py::handle alibi_slopes, py::handle sliding_window, py::handle logits_soft_cap, py::handle sinks,
                      py::handle num_splits, py::handle batch_invariant) {
  AttentionArguments arguments(kWho, &cache);
  HybridParams params;
  params.cache = cache.view();
  read_queries(arguments, q, cu_seqlens_q, params);
  params.out = token_vectors(arguments.read_out(out));
  params.lse = arguments.read_lse(lse);
  arguments.read_sequences({seq_lens, page_table, seq_starts}, params);
  params.causal = read_bool(causal, kWho, "causal");
  arguments.read_scores({sm_scale, alibi_slopes, sliding_window, logits_soft_cap, sinks}, cache.view().head_dim, params);
  arguments.read_splits({num_splits, batch_invariant}, params);
  arguments.require_outputs_apart();
  plan_and_run(
      kWho, arguments.query(), [&](const Execution& execution) { return plan_hybrid_attention(params, execution); },
      [&](const Execution& execution, const HybridPlan& plan, Workspace workspace) {
        quantattn::hybrid_attention(params, execution, plan, workspace);
      });
}

}  // namespace quantattn::binding
