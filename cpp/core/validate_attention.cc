// Rules of the attention calls. What two calls share is checked by one function, for any of their parameter structs.
#include <cmath>
#include <limits>

#include "core/fail.h"
#include "core/validate.h"

namespace quantattn {
namespace {

constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();

template <class Params>
void validate_heads(const Params& p, int num_kv_heads, std::string_view who) {
  require(p.batch_size >= 0, who, ": batch_size must be at least 0, got ", p.batch_size);
  require(p.num_q_heads >= 1 && p.num_q_heads % num_kv_heads == 0, who,
          ": num_q_heads must be a multiple of num_kv_heads, got ", p.num_q_heads, " and ", num_kv_heads);
}

template <class Params>
void validate_features(const Params& p, std::string_view who) {
  require(std::isfinite(p.sm_scale), who, ": sm_scale must be finite, got ", p.sm_scale);
  require(p.sliding_window >= 0, who, ": sliding_window must be at least 1, got ", p.sliding_window);
  require(std::isfinite(p.logits_soft_cap) && p.logits_soft_cap >= 0.f, who,
          ": logits_soft_cap must be positive and finite, got ", p.logits_soft_cap);
}

template <class Params>
void validate_splits(const Params& p, std::string_view who) {
  require(p.num_splits >= 0, who, ": num_splits must be at least 1, got ", p.num_splits);
  require(!(p.num_splits > 0 && p.batch_invariant), who,
          ": num_splits must be None with batch_invariant=True, which fixes the split size, got ", p.num_splits);
}

template <class Params>
void validate_cache_use(const Params& p, std::string_view who) {
  require(p.cache.num_kv_heads >= 1 && p.cache.page_size >= 1, who, ": cache must be filled, got ", p.cache.num_kv_heads,
          " KV heads and pages of ", p.cache.page_size, " tokens");
  require(p.max_pages >= 0, who, ": page_table must have at least 0 columns, got ", p.max_pages);
  require(p.page_table || p.batch_size <= p.cache.num_pages, who,
          ": without page_table sequence b owns page b, so the cache needs a page for each sequence, got ", p.cache.num_pages,
          " pages for batch_size ", p.batch_size);
  require(static_cast<int64_t>(p.max_pages) * p.cache.page_size <= kMaxTokens, who,
          ": page_table must address at most 2^31 - 1 tokens per sequence, got ", p.max_pages, " pages of ", p.cache.page_size);
}

template <class Params>
void validate_starts(const Params& p, std::string_view who) {
  for (int b = 0; p.seq_starts && b < p.batch_size; ++b)
    require(p.seq_starts[b] >= 0, who, ": seq_starts[", b, "] must be at least 0, got ", p.seq_starts[b]);
}

// Host memory: lengths and the page ids of live pages are read and checked.
template <class Params>
void validate_sequences(const Params& p, std::string_view who) {
  const int64_t capacity = static_cast<int64_t>(p.max_pages) * p.cache.page_size;
  for (int b = 0; b < p.batch_size; ++b) {
    const int64_t length = p.seq_lens[b];
    require(length >= 0 && length <= capacity, who, ": seq_lens[", b, "] must be in [0, ", capacity, "] (pages of ",
            p.cache.page_size, " tokens), got ", length);
    if (!p.page_table) continue;
    const int64_t live_pages = (length + p.cache.page_size - 1) / p.cache.page_size;
    for (int64_t i = 0; i < live_pages; ++i) {
      const int64_t page = p.page_table.at(b, i);
      require(page >= 0 && page < p.cache.num_pages, who, ": page_table[", b, ", ", i, "] must be in [0, ", p.cache.num_pages,
              "), got ", page);
    }
  }
}

void validate_token_count(int64_t num_tokens, int batch_size, std::string_view which, std::string_view who) {
  require(num_tokens >= 0 && num_tokens <= kMaxTokens, who, ": ", which, " must have 0 to 2^31 - 1 tokens, got ", num_tokens);
  require(batch_size > 0 || num_tokens == 0, who, ": ", which, " must have no tokens for an empty batch, got ", num_tokens);
}

// Host memory. An empty batch may come without.
void validate_cumulative(Strided1D<const int32_t> cu_seqlens, int batch_size, int64_t num_tokens, std::string_view which,
                         std::string_view who) {
  if (!cu_seqlens) return;
  require(cu_seqlens[0] == 0, who, ": ", which, " must start at 0, got ", cu_seqlens[0]);
  for (int b = 0; b < batch_size; ++b)
    require(cu_seqlens[b] <= cu_seqlens[b + 1], who, ": ", which, " must never decrease, got ", cu_seqlens[b], " and then ",
            cu_seqlens[b + 1]);
  require(cu_seqlens[batch_size] == num_tokens, who, ": ", which, " must end at the number of tokens, ", num_tokens, ", got ",
          cu_seqlens[batch_size]);
}

}  // namespace

void validate(const DecodeParams& p, const Execution& execution) {
  constexpr std::string_view who = "decode_attention";
  validate_cache_use(p, who);
  validate_heads(p, p.cache.num_kv_heads, who);
  require(p.num_q_tokens >= 1 && p.num_q_tokens <= kMaxDecodeTokens, who, ": q must have 1 to ", kMaxDecodeTokens,
          " query tokens per sequence, got ", p.num_q_tokens);
  validate_features(p, who);
  validate_splits(p, who);
  if (p.batch_size == 0) return;
  require(p.q.data != nullptr && p.out.data != nullptr && p.seq_lens, who, ": q, out and seq_lens must not be null pointers");
  if (execution.device.kind != DeviceKind::kCpu) return;
  validate_sequences(p, who);
  validate_starts(p, who);
}

void validate(const HybridParams& p, const Execution& execution) {
  constexpr std::string_view who = "hybrid_attention";
  validate_cache_use(p, who);
  validate_heads(p, p.cache.num_kv_heads, who);
  validate_token_count(p.num_q_tokens, p.batch_size, "q", who);
  validate_features(p, who);
  validate_splits(p, who);
  require(p.batch_size == 0 || (p.cu_seqlens_q && p.seq_lens), who, ": cu_seqlens_q and seq_lens must not be null pointers");
  require(p.num_q_tokens == 0 || (p.q.data != nullptr && p.out.data != nullptr), who, ": q and out must not be null pointers");
  if (execution.device.kind != DeviceKind::kCpu) return;
  validate_cumulative(p.cu_seqlens_q, p.batch_size, p.num_q_tokens, "cu_seqlens_q", who);
  validate_sequences(p, who);
  validate_starts(p, who);
}

void validate(const PrefillParams& p, const Execution& execution) {
  constexpr std::string_view who = "prefill_attention";
  require(p.num_kv_heads >= 1, who, ": num_kv_heads must be at least 1, got ", p.num_kv_heads);
  validate_heads(p, p.num_kv_heads, who);
  validate_head_dim(p.head_dim, who);
  validate_token_count(p.num_q_tokens, p.batch_size, "q", who);
  validate_token_count(p.num_k_tokens, p.batch_size, "k", who);
  validate_features(p, who);
  require(p.batch_size == 0 || (p.cu_seqlens_q && p.cu_seqlens_k), who,
          ": cu_seqlens_q and cu_seqlens_k must not be null pointers");
  require(p.num_q_tokens == 0 || (p.q.data != nullptr && p.out.data != nullptr), who, ": q and out must not be null pointers");
  require(p.num_k_tokens == 0 || (p.k.data != nullptr && p.v.data != nullptr), who, ": k and v must not be null pointers");
  if (execution.device.kind != DeviceKind::kCpu) return;
  validate_cumulative(p.cu_seqlens_q, p.batch_size, p.num_q_tokens, "cu_seqlens_q", who);
  validate_cumulative(p.cu_seqlens_k, p.batch_size, p.num_k_tokens, "cu_seqlens_k", who);
  validate_starts(p, who);
}

}  // namespace quantattn
