#include "quantattn/decode.h"

#include "binding/attention_arguments.h"
#include "binding/attention_run.h"
#include "binding/operations.h"

namespace quantattn::binding {
namespace {

constexpr std::string_view kWho = "decode_attention";

// [B, Hq, D] or [B, n, Hq, D].
VectorArray step_vectors(const Tensor& tensor) {
  const bool has_tokens = tensor.ndim == 4;
  return {tensor.data, tensor.strides[0], has_tokens ? tensor.strides[1] : 0, tensor.strides[tensor.ndim - 2]};
}

void read_queries(AttentionArguments& arguments, py::handle q_object, DecodeParams& params) {
  const Tensor& q = arguments.read_queries(q_object);
  if (q.ndim == 4)
    arguments.require_query_shape({kAnySize, kAnySize, kAnySize, params.cache.head_dim}, "[B, n, Hq, D]");
  else
    arguments.require_query_shape({kAnySize, kAnySize, params.cache.head_dim}, "[B, Hq, D] or [B, n, Hq, D]");
  params.q = step_vectors(q);
  params.q_dtype = require_value_type(q);
  params.batch_size = to_int(q, 0);
  params.num_q_tokens = q.ndim == 4 ? to_int(q, 1) : 1;
  params.num_q_heads = to_int(q, q.ndim - 2);
}

}  // namespace

void decode_attention(const CacheHandle& cache, py::handle q, py::handle out, py::handle lse, py::handle seq_lens,
                      py::handle page_table, py::handle seq_starts, py::handle sm_scale, py::handle alibi_slopes,
                      py::handle sliding_window, py::handle logits_soft_cap, py::handle sinks, py::handle num_splits,
                      py::handle batch_invariant) {
  AttentionArguments arguments(kWho, &cache);
  DecodeParams params;
  params.cache = cache.view();
  read_queries(arguments, q, params);
  params.out = step_vectors(arguments.read_out(out));
  params.lse = arguments.read_lse(lse);
  arguments.read_sequences({seq_lens, page_table, seq_starts}, params);
  arguments.read_scores({sm_scale, alibi_slopes, sliding_window, logits_soft_cap, sinks}, cache.view().head_dim, params);
  arguments.read_splits({num_splits, batch_invariant}, params);
  arguments.require_outputs_apart();
  plan_and_run(
      kWho, arguments.query(), [&](const Execution& execution) { return plan_decode_attention(params, execution); },
      [&](const Execution& execution, const DecodePlan& plan, Workspace workspace) {
        quantattn::decode_attention(params, execution, plan, workspace);
      });
}

}  // namespace quantattn::binding
