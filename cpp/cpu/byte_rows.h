#pragma once

#include "cpu/simd.h"
#include "cpu/stages.h"

// Rows of one-byte codes, four in each 32-bit word.
namespace quantattn::cpu::QATTN_ISA {

// Words [word, word + count) of kLanes rows of a tile from `first` on.
QATTN_INLINE void load_rows(const CodeTile& tile, int first, int word, int count, I32 (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    rows[lane] = load_words(tile.row(first + lane) + word * 4, count);
    tile.prefetch(first + lane, word * 4, kLanes * 4);
  }
}

// Calls `emit(vector, word, lanes)` with every word of 4 bytes of the tile, tokens in lanes.
template <class Emit>
QATTN_INLINE void for_each_key_word(const CodeTile& tile, int head_dim, const Emit& emit) {
  const int num_words = head_dim / 4;
  for (int vector = 0; vector * kLanes < tile.num_tokens; ++vector)
    for (int word = 0; word < num_words; word += kLanes) {
      I32 rows[kLanes];
      const int count = num_words - word < kLanes ? num_words - word : kLanes;
      load_rows(tile, vector * kLanes, word, count, rows);
      transpose(rows);
    // A last partial vector emits words past the row's end, where the next vector of tokens or spare room follows.
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) emit(vector, word + i, rows[i]);
    }
}

}  // namespace quantattn::cpu::QATTN_ISA
