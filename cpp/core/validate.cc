#include "core/validate.h"

#include "core/fail.h"

namespace quantattn {
namespace {

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

void validate_offset(Strided2D<const float> offset, std::string_view which, std::string_view who) {
  require(!offset || offset.column_stride == 1, who, ": ", which,
          " must be contiguous in its last dimension (stride 1), got stride ", offset.column_stride);
  require(is_aligned(offset.data, sizeof(float)), who, ": ", which, " must be aligned to 4 bytes, got ",
          static_cast<const void*>(offset.data));
}

}  // namespace

void validate_head_dim(int head_dim, std::string_view who) {
  require(head_dim >= 1, who, ": head_dim must be at least 1, got ", head_dim);
}

void validate(const KvCacheView& cache, std::string_view who) {
  require(is_kv_pair(cache.format), who, ": kv_format must be a pair of the format table, got ", name(cache.format));
  require(cache.num_pages >= 0, who, ": num_pages must be at least 0, got ", cache.num_pages);
  require(cache.page_size >= 1, who, ": page_size must be at least 1, got ", cache.page_size);
  require(cache.num_kv_heads >= 1, who, ": num_kv_heads must be at least 1, got ", cache.num_kv_heads);
  validate_head_dim(cache.head_dim, who);
  validate_scale(cache.k_scale, cache.format.k, "k", who);
  validate_scale(cache.v_scale, cache.format.v, "v", who);
  validate_offset(cache.k_offset, "k_offset", who);
  if (cache.num_pages == 0) return;
  require(cache.k_codes.data != nullptr && cache.v_codes.data != nullptr, who, ": k and v must not be null pointers");
  require(is_aligned(cache.k_codes.data, static_cast<size_t>(code_bytes(cache.format.k))) &&
              is_aligned(cache.v_codes.data, static_cast<size_t>(code_bytes(cache.format.v))),
          who, ": k and v must be aligned to their element size, got ", cache.k_codes.data, " and ", cache.v_codes.data);
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
  validate_offset(p.offset, "offset", who);
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
