#include "cpu/tile_reader.h"

#include <algorithm>

namespace quantattn::cpu {

TileReader::TileReader(const DecodeParams& params, const EdgeStages& edge, int64_t b, int64_t kv_head)
    : params_(params), edge_(edge), b_(b), kv_head_(kv_head) {}

template <class Body>
void TileReader::for_each_run(int64_t first, int num_tokens, const Body& body) const {
  const int64_t page_size = params_.cache.page_size;
  int64_t index = first / page_size, token = first % page_size;
  for (int done = 0; done < num_tokens; ++index, token = 0) {
    const int count = static_cast<int>(std::min<int64_t>(num_tokens - done, page_size - token));
    body(page_id(index), token, done, count);
    done += count;
  }
}

void TileReader::find_rows(const VectorArray& codes, int element_bytes, int64_t first, int num_tokens,
                           const void** rows) const {
  const int64_t stride = codes.token_stride * element_bytes;
  for_each_run(first, num_tokens, [&](int64_t page, int64_t token, int done, int count) {
    const char* row = static_cast<const char*>(codes.data) + codes.offset(page, token, kv_head_) * element_bytes;
    for (int i = 0; i < count; ++i) rows[done + i] = row + i * stride;
  });
}

void TileReader::find_scales(const ScaleView& scale, int64_t first, int num_tokens, float* scales) const {
  std::fill(scales, scales + kTileTokens, 0.f);
  if (scale.granularity != ScaleGranularity::kTokenHead) {
    const bool is_given = scale.granularity != ScaleGranularity::kNone;
    const float value = is_given ? static_cast<const float*>(scale.data)[scale.offset(0, 0, kv_head_)] : 1.f;
    std::fill(scales, scales + num_tokens, value);
    return;
  }
  uint16_t halves[kTileTokens];
  for_each_run(first, num_tokens, [&](int64_t page, int64_t token, int done, int count) {
    const uint16_t* from = static_cast<const uint16_t*>(scale.data) + scale.offset(page, token, kv_head_);
    for (int i = 0; i < count; ++i) halves[done + i] = from[i * scale.token_stride];
  });
  edge_.load_half_scales(halves, num_tokens, scales);
}

void TileReader::read(int64_t first, int num_tokens, Tile* tile) const {
  const KvCacheView& cache = params_.cache;
  tile->keys.num_tokens = tile->values.num_tokens = num_tokens;
  find_rows(cache.k_codes, code_bytes(cache.format.k), first, num_tokens, tile->keys.rows);
  find_rows(cache.v_codes, code_bytes(cache.format.v), first, num_tokens, tile->values.rows);
  find_scales(cache.k_scale, first, num_tokens, tile->key_scales);
  find_scales(cache.v_scale, first, num_tokens, tile->value_scales);
}

}  // namespace quantattn::cpu
