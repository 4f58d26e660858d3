#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "quantattn/api.h"

namespace quantattn {

enum class KvFormat : uint8_t {
#define QATTN_KV_FORMAT(Type, name, code_bits, has_scale) k##Type,
#define QATTN_KV_PAIR(KType, VType)
#include "quantattn/kv_formats.def"
#undef QATTN_KV_FORMAT
#undef QATTN_KV_PAIR
};

struct KvFormatInfo {
  KvFormat format;
  std::string_view name;
  int code_bits;   // stored bits per element, scales excluded
  bool has_scale;  // x ~ code * scale
};

inline constexpr KvFormatInfo kKvFormats[] = {
#define QATTN_KV_FORMAT(Type, name, code_bits, has_scale) {KvFormat::k##Type, name, code_bits, has_scale},
#define QATTN_KV_PAIR(KType, VType)
#include "quantattn/kv_formats.def"
#undef QATTN_KV_FORMAT
#undef QATTN_KV_PAIR
};

constexpr const KvFormatInfo& info(KvFormat format) { return kKvFormats[static_cast<int>(format)]; }
constexpr std::string_view name(KvFormat format) { return info(format).name; }
constexpr int code_bytes(KvFormat format) { return info(format).code_bits / 8; }

// The formats of K and of V in one cache.
struct KvPair {
  KvFormat k, v;
  friend constexpr bool operator==(KvPair, KvPair) = default;
};

// Every pair that this library defines: each format with itself, then the mixed rows of the table.
QATTN_API std::span<const KvPair> kv_pairs();
QATTN_API bool is_kv_pair(KvPair pair);

// "int8" for a format with itself, "fp16/int8" for a mixed pair.
QATTN_API std::string_view name(KvPair pair);
// The inverse; nothing where the text names no pair of the table.
QATTN_API std::optional<KvPair> parse_kv_pair(std::string_view text);

}  // namespace quantattn
