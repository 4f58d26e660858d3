// append_kv: the bytes of quantize_kv in the right slots, and no other byte.
#include <algorithm>
#include <vector>

#include "check.h"
#include "problem.h"

using namespace quantattn;
using namespace quantattn_test;

namespace {

constexpr int kHeads = 3, kDim = 40, kPages = 4, kPageSize = 5, kTokens = 6;

struct Cache {
  explicit Cache(KvPair format) {
    const auto size = static_cast<size_t>(kPages * kPageSize * kHeads * kDim);
    k.assign(size * static_cast<size_t>(code_bytes(format.k)), 0x5A);
    v.assign(size * static_cast<size_t>(code_bytes(format.v)), 0x5A);
    k_scale.assign(kPages * kPageSize * kHeads, 0x5A5A);
    v_scale = k_scale;
    const VectorArray layout = {nullptr, kPageSize * kHeads * kDim, kHeads * kDim, kDim};
    view.format = format;
    view.k_codes = view.v_codes = layout;
    view.k_codes.data = k.data();
    view.v_codes.data = v.data();
    if (info(format.k).has_scale) view.k_scale = {ScaleGranularity::kTokenHead, k_scale.data(), kPageSize * kHeads, kHeads, 1};
    if (info(format.v).has_scale) view.v_scale = {ScaleGranularity::kTokenHead, v_scale.data(), kPageSize * kHeads, kHeads, 1};
    view.num_pages = kPages;
    view.page_size = kPageSize;
    view.num_kv_heads = kHeads;
    view.head_dim = kDim;
  }
  std::vector<uint8_t> k, v;
  std::vector<uint16_t> k_scale, v_scale;
  KvCacheView view;
};

struct Rows {
  Rows() : k(kTokens * kHeads * kDim), v(k.size()) {
    uint32_t state = 11;
    for (float& x : k) x = uniform(state);
    for (float& x : v) x = 5 * uniform(state);
  }
  AppendParams into(Cache& cache, const std::vector<int64_t>& slots) {
    AppendParams params;
    params.k = {k.data(), 0, kHeads * kDim, kDim};
    params.v = {v.data(), 0, kHeads * kDim, kDim};
    params.num_tokens = static_cast<int64_t>(slots.size());
    params.slot_mapping = {slots.data()};
    params.cache = cache.view;
    return params;
  }
  std::vector<float> k, v;
};

void rows_reach_their_slots(KvPair format, bool has_offset) {
  Rows rows;
  Cache cache(format);
  uint32_t state = 3;
  std::vector<float> offset(kHeads * kDim);
  for (float& x : offset) x = 20 * uniform(state);
  if (has_offset) cache.view.k_offset = {offset.data(), kDim};
  const std::vector<int64_t> slots = {17, -1, 0, 9, -1, 4};
  append_kv(rows.into(cache, slots), {});
  const auto row_bytes = static_cast<size_t>(kHeads * kDim * code_bytes(format.k));
  std::vector<uint8_t> expected(row_bytes);
  std::vector<uint16_t> scale(kHeads);
  for (int64_t slot = 0; slot < kPages * kPageSize; ++slot) {
    const auto token = std::find(slots.begin(), slots.end(), slot);
    const uint8_t* stored = &cache.k[static_cast<size_t>(slot) * row_bytes];
    if (token == slots.end()) {
      CHECK(std::all_of(stored, stored + row_bytes, [](uint8_t byte) { return byte == 0x5A; }), name(format), " slot ", slot);
      continue;
    }
    CodecParams codec;
    codec.format = format.k;
    codec.values = {&rows.k[static_cast<size_t>((token - slots.begin()) * kHeads * kDim)], 0, 0, kDim};
    codec.codes = {expected.data(), 0, 0, kDim};
    if (info(format.k).has_scale) codec.scale = {ScaleGranularity::kTokenHead, scale.data(), 0, 0, 1};
    codec.offset = cache.view.k_offset;
    codec.num_pages = codec.page_size = 1;
    codec.num_heads = kHeads;
    codec.head_dim = kDim;
    quantize_kv(codec, {});
    CHECK(std::equal(expected.begin(), expected.end(), stored), name(format), " codes of slot ", slot);
    if (info(format.k).has_scale)
      CHECK(std::equal(scale.begin(), scale.end(), &cache.k_scale[static_cast<size_t>(slot * kHeads)]), name(format), " scale ",
            slot);
  }
}

void a_bad_slot_changes_nothing() {
  Rows rows;
  for (int64_t bad : {int64_t{-2}, int64_t{kPages * kPageSize}, int64_t{1} << 62}) {
    Cache cache({KvFormat::kInt8, KvFormat::kInt8});
    CHECK_THROWS(append_kv(rows.into(cache, {3, 4, bad}), {}), InvalidArgument,
                 "append_kv: slot_mapping[2] must be -1 or in [0, 20)");
    CHECK(std::all_of(cache.k.begin(), cache.k.end(), [](uint8_t byte) { return byte == 0x5A; }), "slot ", bad);
    CHECK(std::all_of(cache.v_scale.begin(), cache.v_scale.end(), [](uint16_t bits) { return bits == 0x5A5A; }), "slot ", bad);
  }
}

void a_repeated_slot_keeps_the_last_row() {
  Rows rows;
  Cache repeated({KvFormat::kInt8, KvFormat::kInt8}), once({KvFormat::kInt8, KvFormat::kInt8});
  append_kv(rows.into(repeated, {7, 7, 7}), {});
  append_kv(rows.into(once, {-1, -1, 7}), {});
  CHECK(repeated.k == once.k && repeated.v == once.v && repeated.k_scale == once.k_scale, "rows of slot 7");
}

}  // namespace

int main() {
  for (KvPair pair : kv_pairs())
    for (bool has_offset : {false, true}) rows_reach_their_slots(pair, has_offset);
  a_bad_slot_changes_nothing();
  a_repeated_slot_keeps_the_last_row();
  return finish("append_test");
}
