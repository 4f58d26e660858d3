#pragma once

#include "cpu/attention_batch.h"
#include "cpu/isa_table.h"

namespace quantattn::cpu {

// Where the codes and scales of one tile's tokens are, for the first KV head of a block.
struct TileRows {
  int num_tokens = 0;
  const char* keys[kTileTokens];  // past num_tokens the last row again
  const char* values[kTileTokens];
  const char* key_scales[kTileTokens];  // only with scales per token
  const char* value_scales[kTileTokens];
};

// Finds the keys and values of one sequence.
class TileReader {
 public:
  TileReader(const AttentionBatch& batch, int64_t b, int64_t first_key, int64_t first_head);

  // Tokens [first, first + num_tokens), at most kTileTokens of them.
  void read(int64_t first, int num_tokens, TileRows* tile) const;

  // Codes of KV head first_head + `head`, and of the tile and head that will be read after them.
  CodeTile keys(const TileRows& tile, int64_t head, const TileRows& next, int64_t next_head) const {
    return {tile.num_tokens, tile.keys, head * k_head_bytes_, next.keys, next_head * k_head_bytes_};
  }
  CodeTile values(const TileRows& tile, int64_t head, const TileRows& next, int64_t next_head) const {
    return {tile.num_tokens, tile.values, head * v_head_bytes_, next.values, next_head * v_head_bytes_};
  }
  // Scales of that head, of keys times sm_scale; zero past the last token.
  void load_scales(const EdgeStages& edge, const TileRows& tile, int64_t head, float* key_scales, float* value_scales) const;

 private:
  int64_t page_id(int64_t index) const { return batch_.page_table ? batch_.page_table.at(b_, index) : b_; }
  void load_scales(const EdgeStages& edge, const ScaleView& scale, const char* const* rows, int num_tokens, int64_t head,
                   float factor, float* scales) const;

  const AttentionBatch& batch_;
  int64_t b_, first_key_, first_head_;
  int64_t k_head_bytes_, v_head_bytes_;
};

}  // namespace quantattn::cpu
