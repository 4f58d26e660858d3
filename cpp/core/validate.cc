#include "core/validate.h"

#include <cmath>
#include <limits>

#include "core/fail.h"

namespace quantattn {
namespace {

constexpr std::string_view kDecode = "decode_attention";

bool is_aligned(const void* data, size_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

void validate_scale(const ScaleView& scale, KvFormat format, std::string_view which, std::string_view who) {
  const bool is_given = scale.granularity != ScaleGranularity::kNone;
  require(is_given == info(format).has_scale, who, ": ", which, "_scale must be ", info(format).has_scale ? "given" : "absent",
          " for kv_format ", name(format), ", got ", is_given ? "one" : "none");
  if (!is_given) return;
  const size_t scale_bytes = scale.granularity == ScaleGranularity::kTokenHead ? 2 : 4;
  require(scale.data != nullptr, who, ": ", which, "_scale must not be a null pointer");
  require(is_aligned(scale.data, scale_bytes), who, ": ", which, "_scale must be aligned to ", scale_bytes, " bytes, got ",
          scale.data);
}

void validate_head_dim(int head_dim, std::string_view who) {
  require(head_dim >= 1, who, ": head_dim must be at least 1, got ", head_dim);
}

void validate_features(const DecodeParams& p) {
  require(std::isfinite(p.sm_scale), kDecode, ": sm_scale must be finite, got ", p.sm_scale);
  require(p.sliding_window >= 0, kDecode, ": sliding_window must be at least 1, got ", p.sliding_window);
  require(std::isfinite(p.logits_soft_cap) && p.logits_soft_cap >= 0.f, kDecode,
          ": logits_soft_cap must be positive and finite, got ", p.logits_soft_cap);
  require(p.num_splits >= 0, kDecode, ": num_splits must be at least 1, got ", p.num_splits);
  require(!(p.num_splits > 0 && p.batch_invariant), kDecode,
          ": num_splits must be None with batch_invariant=True, which fixes the split size, got ", p.num_splits);
}

// Host memory: lengths, first keys and the page ids of live pages are read and checked.
void validate_sequences(const DecodeParams& p) {
  const int64_t capacity = static_cast<int64_t>(p.max_pages) * p.cache.page_size;
  for (int b = 0; b < p.batch_size; ++b) {
    const int64_t length = p.seq_lens[b];
    require(length >= 0 && length <= capacity, kDecode, ": seq_lens[", b, "] must be in [0, ", capacity, "] (pages of ",
            p.cache.page_size, " tokens), got ", length);
    if (p.seq_starts) require(p.seq_starts[b] >= 0, kDecode, ": seq_starts[", b, "] must be at least 0, got ", p.seq_starts[b]);
    if (!p.page_table) continue;
    const int64_t live_pages = (length + p.cache.page_size - 1) / p.cache.page_size;
    for (int64_t i = 0; i < live_pages; ++i) {
      const int64_t page = p.page_table.at(b, i);
      require(page >= 0 && page < p.cache.num_pages, kDecode, ": page_table[", b, ", ", i, "] must be in [0, ",
              p.cache.num_pages, "), got ", page);
    }
  }
}

}  // namespace

void validate(const KvCacheView& cache, std::string_view who) {
  require(is_kv_pair(cache.format), who, ": kv_format must be a pair of the format table, got ", name(cache.format));
  require(cache.num_pages >= 0, who, ": num_pages must be at least 0, got ", cache.num_pages);
  require(cache.page_size >= 1, who, ": page_size must be at least 1, got ", cache.page_size);
  require(cache.num_kv_heads >= 1, who, ": num_kv_heads must be at least 1, got ", cache.num_kv_heads);
  validate_head_dim(cache.head_dim, who);
  validate_scale(cache.k_scale, cache.format.k, "k", who);
  validate_scale(cache.v_scale, cache.format.v, "v", who);
  if (cache.num_pages == 0) return;
  require(cache.k_codes.data != nullptr && cache.v_codes.data != nullptr, who, ": k and v must not be null pointers");
  require(is_aligned(cache.k_codes.data, static_cast<size_t>(code_bytes(cache.format.k))) &&
              is_aligned(cache.v_codes.data, static_cast<size_t>(code_bytes(cache.format.v))),
          who, ": k and v must be aligned to their element size, got ", cache.k_codes.data, " and ", cache.v_codes.data);
}

void validate(const DecodeParams& p, const Execution& execution) {
  const int num_kv_heads = p.cache.num_kv_heads;
  require(num_kv_heads >= 1 && p.cache.page_size >= 1, kDecode, ": cache must be filled, got ", num_kv_heads,
          " KV heads and pages of ", p.cache.page_size, " tokens");
  require(p.batch_size >= 0, kDecode, ": batch_size must be at least 0, got ", p.batch_size);
  require(p.num_q_tokens >= 1 && p.num_q_tokens <= kMaxDecodeTokens, kDecode, ": q must have 1 to ", kMaxDecodeTokens,
          " query tokens per sequence, got ", p.num_q_tokens);
  require(p.num_q_heads >= 1 && p.num_q_heads % num_kv_heads == 0, kDecode,
          ": num_q_heads must be a multiple of num_kv_heads, got ", p.num_q_heads, " and ", num_kv_heads);
  require(p.max_pages >= 0, kDecode, ": page_table must have at least 0 columns, got ", p.max_pages);
  require(p.page_table || p.batch_size <= p.cache.num_pages, kDecode,
          ": without page_table sequence b owns page b, so the cache needs a page for each sequence, got ", p.cache.num_pages,
          " pages for batch_size ", p.batch_size);
  require(static_cast<int64_t>(p.max_pages) * p.cache.page_size <= std::numeric_limits<int32_t>::max(), kDecode,
          ": page_table must address at most 2^31 - 1 tokens per sequence, got ", p.max_pages, " pages of ", p.cache.page_size);
  validate_features(p);
  if (p.batch_size == 0) return;
  require(p.q.data != nullptr && p.out.data != nullptr && p.seq_lens, kDecode,
          ": q, out and seq_lens must not be null pointers");
  if (execution.device.kind == DeviceKind::kCpu) validate_sequences(p);
}

void validate(const CodecParams& p, std::string_view who) {
  require(p.num_pages >= 0 && p.page_size >= 0 && p.num_heads >= 0, who, ": sizes must not be negative, got [", p.num_pages,
          ", ", p.page_size, ", ", p.num_heads, "]");
  validate_head_dim(p.head_dim, who);
  const bool is_empty = p.num_pages == 0 || p.page_size == 0 || p.num_heads == 0;
  if (is_empty) return;
  require(p.values.data != nullptr && p.codes.data != nullptr, who, ": values and codes must not be null pointers");
  const bool is_given = p.scale.granularity != ScaleGranularity::kNone;
  require(is_given == info(p.format).has_scale, who, ": scale must be ", info(p.format).has_scale ? "given" : "absent",
          " for kv_format ", name(p.format), ", got ", is_given ? "one" : "none");
  require(!is_given || p.scale.data != nullptr, who, ": scale must not be a null pointer");
}

void validate(const AppendParams& p, const Execution& execution) {
  constexpr std::string_view who = "append_kv";
  require(p.num_tokens >= 0, who, ": num_tokens must be at least 0, got ", p.num_tokens);
  if (p.num_tokens == 0) return;
  require(p.k.data != nullptr && p.v.data != nullptr && p.slot_mapping, who,
          ": k, v and slot_mapping must not be null pointers");
  if (execution.device.kind != DeviceKind::kCpu) return;
  const int64_t num_slots = p.cache.num_pages * p.cache.page_size;
  for (int64_t t = 0; t < p.num_tokens; ++t)
    require(p.slot_mapping[t] >= -1 && p.slot_mapping[t] < num_slots, who, ": slot_mapping[", t, "] must be -1 or in [0, ",
            num_slots, "), got ", p.slot_mapping[t]);
}

void validate(const MergeParams& p) {
  constexpr std::string_view who = "merge_states";
  require(p.batch_size >= 0 && p.num_q_tokens >= 0 && p.num_q_heads >= 0, who, ": sizes must not be negative, got [",
          p.batch_size, ", ", p.num_q_tokens, ", ", p.num_q_heads, "]");
  validate_head_dim(p.head_dim, who);
  if (p.batch_size == 0 || p.num_q_tokens == 0 || p.num_q_heads == 0) return;
  require(p.out_a.data && p.out_b.data && p.out.data && p.lse_a && p.lse_b && p.lse, who,
          ": out_a, lse_a, out_b, lse_b, out and lse must not be null pointers");
}

}  // namespace quantattn
