#include "quantattn/kv_format.h"

#include <string>
#include <vector>

namespace quantattn {

std::span<const KvPair> kv_pairs() {
  static constexpr KvPair kPairs[] = {
#define QATTN_KV_FORMAT(Type, name, code_bits, has_scale) {KvFormat::k##Type, KvFormat::k##Type},
#define QATTN_KV_PAIR(KType, VType)
#include "quantattn/kv_formats.def"
#undef QATTN_KV_FORMAT
#undef QATTN_KV_PAIR
#define QATTN_KV_FORMAT(Type, name, code_bits, has_scale)
#define QATTN_KV_PAIR(KType, VType) {KvFormat::k##KType, KvFormat::k##VType},
#include "quantattn/kv_formats.def"
#undef QATTN_KV_FORMAT
#undef QATTN_KV_PAIR
  };
  return kPairs;
}

bool is_kv_pair(KvPair pair) {
  for (KvPair row : kv_pairs())
    if (row == pair) return true;
  return false;
}

std::string_view name(KvPair pair) {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const KvFormatInfo& k : kKvFormats)
      for (const KvFormatInfo& v : kKvFormats)
        all.push_back(&k == &v ? std::string(k.name) : std::string(k.name) + "/" + std::string(v.name));
    return all;
  }();
  return names[static_cast<size_t>(pair.k) * std::size(kKvFormats) + static_cast<size_t>(pair.v)];
}

std::optional<KvPair> parse_kv_pair(std::string_view text) {
  for (KvPair pair : kv_pairs())
    if (name(pair) == text) return pair;
  return std::nullopt;
}

}  // namespace quantattn
