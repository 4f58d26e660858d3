#include "attention_call.h"

#include <numeric>

#include "quantattn/decode.h"
#include "quantattn/hybrid.h"
#include "quantattn/prefill.h"

namespace sample_runner {
namespace {

constexpr unsigned char kUnwritten = 0xFF;  // NaN in every output type

template <class T>
std::vector<T> gather(const std::vector<T>& rows, std::span<const int> sequences, size_t row_size = 1) {
  std::vector<T> gathered;
  if (rows.empty()) return gathered;
  for (int b : sequences) {
    const auto first = rows.begin() + static_cast<int64_t>(static_cast<size_t>(b) * row_size);
    gathered.insert(gathered.end(), first, first + static_cast<int64_t>(row_size));
  }
  return gathered;
}

std::vector<int32_t> first_query_tokens(const Problem& p, std::span<const int> sequences) {
  std::vector<int32_t> firsts{0};
  for (int b : sequences) firsts.push_back(firsts.back() + p.num_q_tokens_of(b));
  return firsts;
}

std::vector<std::byte> queries(const Problem& p, std::span<const int> sequences) {
  const int64_t token_bytes = int64_t{p.num_q_heads} * p.head_dim * quantattn::bytes_of(p.q_dtype);
  std::vector<std::byte> gathered;
  for (int b : sequences) {
    const auto first = p.q.begin() + p.cu_seqlens_q[static_cast<size_t>(b)] * token_bytes;
    gathered.insert(gathered.end(), first, first + p.num_q_tokens_of(b) * token_bytes);
  }
  return gathered;
}

// Everything of a call that lives on the device, but K and V.
struct CallTensors {
  CallTensors(const Problem& p, std::span<const int> sequences, DeviceMemory& memory)
      : host_cu_seqlens_q(first_query_tokens(p, sequences)),
        q(Buffer::of<std::byte>(memory, queries(p, sequences))),
        out(memory, q.size(), kUnwritten),
        lse(memory, static_cast<size_t>(num_q_tokens() * p.num_q_heads) * sizeof(float), kUnwritten),
        cu_seqlens_q(Buffer::of<int32_t>(memory, host_cu_seqlens_q)),
        seq_lens(Buffer::of<int32_t>(memory, gather(p.seq_lens, sequences))),
        seq_starts(Buffer::of<int32_t>(memory, gather(p.seq_starts, sequences))),
        alibi_slopes(Buffer::of<float>(memory, p.alibi_row_stride() == 0
                                                   ? p.alibi_slopes
                                                   : gather(p.alibi_slopes, sequences, static_cast<size_t>(p.num_q_heads)))),
        sinks(Buffer::of<float>(memory, p.sinks)),
        batch_size(static_cast<int>(sequences.size())) {}

  int64_t num_q_tokens() const { return host_cu_seqlens_q.back(); }

  // What the parameters of all three calls have in common. `sequence_stride`: of q and out.
  template <class Params>
  void fill(Params& params, const Problem& p, int64_t sequence_stride) const {
    const int64_t head = p.head_dim, token = head * p.num_q_heads;
    params.q = {q.as<void>(), sequence_stride, token, head};
    params.out = {out.as<void>(), sequence_stride, token, head};
    params.lse = lse.as<float>();
    params.batch_size = batch_size;
    params.num_q_heads = p.num_q_heads;
    if (!p.seq_starts.empty()) params.seq_starts.data = seq_starts.as<const int32_t>();
    params.sm_scale = p.sm_scale;
    if (!p.alibi_slopes.empty()) params.alibi_slopes = {alibi_slopes.as<const float>(), p.alibi_row_stride(), 1};
    if (!p.sinks.empty()) params.sinks.data = sinks.as<const float>();
    params.sliding_window = p.sliding_window;
    params.logits_soft_cap = p.logits_soft_cap;
  }

  std::vector<int32_t> host_cu_seqlens_q;
  Buffer q, out, lse, cu_seqlens_q, seq_lens, seq_starts, alibi_slopes, sinks;
  int batch_size;
};

quantattn::Execution execution_of(const Options& options) {
  return {.device = options.device, .stream = nullptr, .num_threads = options.num_threads, .kernel = options.kernel};
}

quantattn::DecodePlan make_plan(const quantattn::DecodeParams& params, const quantattn::Execution& execution) {
  return quantattn::plan_decode_attention(params, execution);
}
quantattn::HybridPlan make_plan(const quantattn::HybridParams& params, const quantattn::Execution& execution) {
  return quantattn::plan_hybrid_attention(params, execution);
}
void run_plan(const quantattn::DecodeParams& params, const quantattn::Execution& execution, const quantattn::DecodePlan& plan,
              quantattn::Workspace workspace) {
  quantattn::decode_attention(params, execution, plan, workspace);
}
void run_plan(const quantattn::HybridParams& params, const quantattn::Execution& execution, const quantattn::HybridPlan& plan,
              quantattn::Workspace workspace) {
  quantattn::hybrid_attention(params, execution, plan, workspace);
}

void set_query_tokens(quantattn::DecodeParams& params, const Problem& p, const CallTensors& tensors,
                      std::span<const int> sequences) {
  params.num_q_tokens = sequences.empty() ? 1 : p.num_q_tokens_of(sequences[0]);
  tensors.fill(params, p, int64_t{params.num_q_tokens} * p.num_q_heads * p.head_dim);
}
void set_query_tokens(quantattn::HybridParams& params, const Problem& p, const CallTensors& tensors, std::span<const int>) {
  params.num_q_tokens = tensors.num_q_tokens();
  params.cu_seqlens_q.data = tensors.cu_seqlens_q.as<const int32_t>();
  params.causal = p.is_causal;
  tensors.fill(params, p, params.num_q_tokens * p.num_q_heads * p.head_dim);
}

// decode_attention or hybrid_attention.
template <class Params, class Plan>
class CacheCall final : public AttentionCall {
 public:
  CacheCall(const Problem& p, const Cache& cache, std::span<const int> sequences, const Options& options, DeviceMemory& memory)
      : tensors_(p, sequences, memory), execution_(execution_of(options)) {
    set_query_tokens(params_, p, tensors_, sequences);
    params_.q_dtype = p.q_dtype;
    params_.cache = cache.view();
    if (sequences.size() == static_cast<size_t>(p.batch_size)) {
      params_.page_table = cache.page_table();
    } else {
      page_table_ = Buffer::of<int32_t>(memory, cache.pages_of(sequences));
      params_.page_table = {page_table_.as<const int32_t>(), cache.max_pages(), 1};
    }
    params_.max_pages = cache.max_pages();
    params_.seq_lens.data = tensors_.seq_lens.as<const int32_t>();
    params_.num_splits = options.num_splits;
    params_.batch_invariant = options.is_batch_invariant;
    plan_ = make_plan(params_, execution_);
    scratch_ = Buffer(memory, static_cast<size_t>(plan_.workspace_bytes), kUnwritten);
    counters_ = Buffer(memory, static_cast<size_t>(plan_.counter_bytes), 0);
    facts_ = {std::string(plan_.backend), std::string(plan_.variant), plan_.num_splits, plan_.split_size,
              plan_.workspace_bytes + plan_.counter_bytes};
  }

  void run() const override { run_plan(params_, execution_, plan_, {scratch_.as<void>(), counters_.as<void>()}); }
  const PlanFacts& plan() const override { return facts_; }
  const Buffer& out() const override { return tensors_.out; }
  const Buffer& lse() const override { return tensors_.lse; }

 private:
  CallTensors tensors_;
  Buffer page_table_, scratch_, counters_;
  quantattn::Execution execution_;
  Params params_;
  Plan plan_;
  PlanFacts facts_;
};

class PrefillCall final : public AttentionCall {
 public:
  PrefillCall(const Problem& p, const FreshKv& kv, const Options& options, DeviceMemory& memory)
      : tensors_(p, all_sequences(p), memory), execution_(execution_of(options)) {
    params_.num_q_tokens = tensors_.num_q_tokens();
    tensors_.fill(params_, p, params_.num_q_tokens * p.num_q_heads * p.head_dim);
    params_.k = kv.array(FreshKv::Side::kK);
    params_.v = kv.array(FreshKv::Side::kV);
    params_.dtype = p.q_dtype;
    params_.num_kv_heads = p.num_kv_heads;
    params_.head_dim = p.head_dim;
    params_.num_k_tokens = kv.num_tokens();
    params_.cu_seqlens_q.data = tensors_.cu_seqlens_q.as<const int32_t>();
    params_.cu_seqlens_k = kv.cu_seqlens_k();
    params_.causal = p.is_causal;
    plan_ = quantattn::plan_prefill_attention(params_, execution_);
    scratch_ = Buffer(memory, static_cast<size_t>(plan_.workspace_bytes), kUnwritten);
    facts_ = {std::string(plan_.backend), std::string(plan_.variant), {}, {}, plan_.workspace_bytes};
  }

  void run() const override { quantattn::prefill_attention(params_, execution_, plan_, scratch_.as<void>()); }
  const PlanFacts& plan() const override { return facts_; }
  const Buffer& out() const override { return tensors_.out; }
  const Buffer& lse() const override { return tensors_.lse; }

 private:
  CallTensors tensors_;
  Buffer scratch_;
  quantattn::Execution execution_;
  quantattn::PrefillParams params_;
  quantattn::PrefillPlan plan_;
  PlanFacts facts_;
};

}  // namespace

std::unique_ptr<AttentionCall> plan_decode(const Problem& p, const Cache& cache, std::span<const int> sequences,
                                           const Options& options, DeviceMemory& memory) {
  using Call = CacheCall<quantattn::DecodeParams, quantattn::DecodePlan>;
  return std::make_unique<Call>(p, cache, sequences, options, memory);
}

std::unique_ptr<AttentionCall> plan_hybrid(const Problem& p, const Cache& cache, std::span<const int> sequences,
                                           const Options& options, DeviceMemory& memory) {
  using Call = CacheCall<quantattn::HybridParams, quantattn::HybridPlan>;
  return std::make_unique<Call>(p, cache, sequences, options, memory);
}

std::unique_ptr<AttentionCall> plan_prefill(const Problem& p, const FreshKv& kv, const Options& options, DeviceMemory& memory) {
  return std::make_unique<PrefillCall>(p, kv, options, memory);
}

std::vector<int> all_sequences(const Problem& p) {
  std::vector<int> sequences(static_cast<size_t>(p.batch_size));
  std::iota(sequences.begin(), sequences.end(), 0);
  return sequences;
}

}  // namespace sample_runner
