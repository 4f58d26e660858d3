#pragma once

#include "cpu/isa_table.h"
#include "quantattn/decode.h"

namespace quantattn::cpu {

// One tile of a sequence and KV head: where its codes are, and its scales.
struct Tile {
  CodeTile keys, values;
  alignas(64) float key_scales[kTileTokens];
  alignas(64) float value_scales[kTileTokens];  // zero past the last token
};

// Finds tokens in the pages of one sequence.
class TileReader {
 public:
  TileReader(const DecodeParams& params, const EdgeStages& edge, int64_t b, int64_t kv_head);

  // Tokens [first, first + num_tokens), at most kTileTokens of them.
  void read(int64_t first, int num_tokens, Tile* tile) const;

 private:
  int64_t page_id(int64_t index) const { return params_.page_table ? params_.page_table.at(b_, index) : b_; }
  void find_rows(const VectorArray& codes, int element_bytes, int64_t first, int num_tokens, const void** rows) const;
  void find_scales(const ScaleView& scale, int64_t first, int num_tokens, float* scales) const;
  // Calls body(page, first token in the page, position in the tile, count) for each run of tokens in one page.
  template <class Body>
  void for_each_run(int64_t first, int num_tokens, const Body& body) const;

  const DecodeParams& params_;
  const EdgeStages& edge_;
  int64_t b_, kv_head_;
};

}  // namespace quantattn::cpu
