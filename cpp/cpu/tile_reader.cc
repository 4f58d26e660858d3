#include "cpu/tile_reader.h"

#include <algorithm>

namespace quantattn::cpu {
namespace {

// Addresses of `count` tokens of one page from `token` on; Array is a VectorArray or a ScaleView.
template <class Array>
void fill_rows(const Array& array, int64_t element_bytes, int64_t page, int64_t token, int64_t head, int count,
               const char** rows) {
  const char* row = static_cast<const char*>(array.data) + array.offset(page, token, head) * element_bytes;
  const int64_t stride = array.token_stride * element_bytes;
  for (int i = 0; i < count; ++i) rows[i] = row + i * stride;
}

bool is_per_token(const ScaleView& scale) { return scale.granularity == ScaleGranularity::kTokenHead; }

}  // namespace

TileReader::TileReader(const AttentionBatch& batch, int64_t b, int64_t first_key, int64_t first_head)
    : batch_(batch),
      b_(b),
      first_key_(first_key),
      first_head_(first_head),
      k_head_bytes_(batch.cache.k_codes.head_stride * batch.key_bytes),
      v_head_bytes_(batch.cache.v_codes.head_stride * batch.value_bytes) {}

void TileReader::read(int64_t first, int num_tokens, TileRows* tile) const {
  const KvCacheView& cache = batch_.cache;
  tile->num_tokens = num_tokens;
  first += first_key_;
  int64_t index = first / cache.page_size, token = first % cache.page_size;
  for (int done = 0; done < num_tokens; ++index, token = 0) {
    const int count = static_cast<int>(std::min<int64_t>(num_tokens - done, cache.page_size - token));
    const int64_t page = page_id(index);
    fill_rows(cache.k_codes, batch_.key_bytes, page, token, first_head_, count, tile->keys + done);
    fill_rows(cache.v_codes, batch_.value_bytes, page, token, first_head_, count, tile->values + done);
    if (is_per_token(cache.k_scale)) fill_rows(cache.k_scale, 2, page, token, first_head_, count, tile->key_scales + done);
    if (is_per_token(cache.v_scale)) fill_rows(cache.v_scale, 2, page, token, first_head_, count, tile->value_scales + done);
    done += count;
  }
  std::fill(tile->keys + num_tokens, tile->keys + kTileTokens, tile->keys[num_tokens - 1]);
  std::fill(tile->values + num_tokens, tile->values + kTileTokens, tile->values[num_tokens - 1]);
}

void TileReader::load_scales(const EdgeStages& edge, const TileRows& tile, int64_t head, float* key_scales,
                             float* value_scales) const {
  load_scales(edge, batch_.cache.k_scale, tile.key_scales, tile.num_tokens, head, batch_.sm_scale, key_scales);
  load_scales(edge, batch_.cache.v_scale, tile.value_scales, tile.num_tokens, head, 1.f, value_scales);
}

void TileReader::load_scales(const EdgeStages& edge, const ScaleView& scale, const char* const* rows, int num_tokens,
                             int64_t head, float factor, float* scales) const {
  if (is_per_token(scale)) {
    alignas(64) uint16_t halves[kTileTokens];
    const int64_t offset = head * scale.head_stride * 2;
    for (int i = 0; i < num_tokens; ++i) halves[i] = *reinterpret_cast<const uint16_t*>(rows[i] + offset);
    std::fill(halves + num_tokens, halves + kTileTokens, uint16_t{0});
    return edge.load_half_scales(halves, factor, scales);
  }
  const bool is_given = scale.granularity != ScaleGranularity::kNone;
  const float value = is_given ? static_cast<const float*>(scale.data)[scale.offset(0, 0, first_head_ + head)] : 1.f;
  std::fill(scales, scales + num_tokens, value * factor);
  std::fill(scales + num_tokens, scales + kTileTokens, 0.f);
}

}  // namespace quantattn::cpu
