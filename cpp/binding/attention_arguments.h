#pragma once

#include "binding/arguments.h"
#include "binding/cache_handle.h"

namespace quantattn::binding {

// Groups of keywords that attention calls share, as Python gave them.
struct SequenceKeywords {
  py::handle seq_lens, page_table, seq_starts;
};
struct ScoreKeywords {
  py::handle sm_scale, alibi_slopes, sliding_window, logits_soft_cap, sinks;
};
struct SplitKeywords {
  py::handle num_splits, batch_invariant;
};

// Reads and checks the arguments of one attention call and remembers its tensors, so that the outputs can be held apart from
// the inputs in the end. Queries are read first: dtype and shapes of the others follow them.
// Shapes: B = batch_size, Hq = num_q_heads, S = rows of K, H = num_kv_heads, D = head_dim.
class AttentionArguments {
 public:
  // Every tensor must be on the cache's device; with no cache, on that of the queries.
  AttentionArguments(std::string_view who, const CacheHandle* cache);

  // float32, float16 or bfloat16, of any shape until `require_query_shape`, which wants D contiguous as well.
  const Tensor& read_queries(py::handle q);
  void require_query_shape(std::initializer_list<int64_t> shape, std::string_view symbols) const;
  // [S, H, D] in the dtype of the queries. `size` and `num_heads` may be kAnySize.
  const Tensor& read_rows(py::handle rows, std::string_view name, int64_t size, int64_t num_heads);
  // int32 [size].
  Strided1D<const int32_t> read_ints(py::handle ints, std::string_view name, int64_t size, std::string_view symbols);
  // int32 [B + 1], the queries' tokens of each sequence one after another. Returns B.
  int read_batch_size(py::handle cu_seqlens_q, Strided1D<const int32_t>& ints);
  // Shape and dtype of the queries.
  const Tensor& read_out(py::handle out);
  // float32, contiguous, the queries' shape without D; null for None.
  float* read_lse(py::handle lse);

  // Each fills the members of that name in a params struct whose sizes are known.
  template <class Params>
  void read_sequences(const SequenceKeywords& keywords, Params& params);
  template <class Params>
  void read_scores(const ScoreKeywords& keywords, int head_dim, Params& params);
  template <class Params>
  void read_splits(const SplitKeywords& keywords, Params& params) const;

  // No output may have an element twice or share a byte with an input, the cache included, or with another output.
  void require_outputs_apart() const;

  const Tensor& query() const { return inputs_[0]; }

 private:
  const Tensor& read_input(py::handle object, std::string_view name, ElementType type);
  const Tensor& add_input(const Tensor& tensor);
  const Tensor& add_output(const Tensor& tensor);
  void require_common_device(const Tensor& tensor) const;
  Strided2D<const int32_t> read_page_table(py::handle page_table, int batch_size, int& max_pages);
  Strided2D<const float> read_alibi_slopes(py::handle slopes, int batch_size, int num_q_heads);
  Strided1D<const float> read_sinks(py::handle sinks, int num_q_heads);
  float read_sm_scale(py::handle sm_scale, int head_dim) const;
  float read_logits_soft_cap(py::handle cap) const;

  static constexpr int kMaxInputs = 8, kMaxOutputs = 2;
  std::string_view who_;
  const CacheHandle* cache_;
  Tensor inputs_[kMaxInputs], outputs_[kMaxOutputs];
  int num_inputs_ = 0, num_outputs_ = 0;
};

template <class Params>
void AttentionArguments::read_sequences(const SequenceKeywords& keywords, Params& params) {
  params.seq_lens = read_ints(keywords.seq_lens, "seq_lens", params.batch_size, "[B]");
  if (!keywords.page_table.is_none())
    params.page_table = read_page_table(keywords.page_table, params.batch_size, params.max_pages);
  if (!keywords.seq_starts.is_none())
    params.seq_starts = read_ints(keywords.seq_starts, "seq_starts", params.batch_size, "[B]");
}

template <class Params>
void AttentionArguments::read_scores(const ScoreKeywords& keywords, int head_dim, Params& params) {
  params.alibi_slopes = read_alibi_slopes(keywords.alibi_slopes, params.batch_size, params.num_q_heads);
  params.sinks = read_sinks(keywords.sinks, params.num_q_heads);
  params.sm_scale = read_sm_scale(keywords.sm_scale, head_dim);
  params.sliding_window = read_optional_count(keywords.sliding_window, who_, "sliding_window").value_or(0);
  params.logits_soft_cap = read_logits_soft_cap(keywords.logits_soft_cap);
}

template <class Params>
void AttentionArguments::read_splits(const SplitKeywords& keywords, Params& params) const {
  params.num_splits = read_optional_count(keywords.num_splits, who_, "num_splits").value_or(0);
  params.batch_invariant = read_bool(keywords.batch_invariant, who_, "batch_invariant");
}

}  // namespace quantattn::binding
