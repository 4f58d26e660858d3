#pragma once

#include "cpu/simd.h"
#include "cpu/stages.h"

// Rows of codes of one or two bytes, taken as 32-bit words.
namespace quantattn::cpu::QATTN_ISA {

// Words [word, word + count) of kLanes rows of a tile from `first` on.
QATTN_INLINE void load_rows(const CodeTile& tile, int first, int word, int count, I32 (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    rows[lane] = load_words(tile.row(first + lane) + word * 4, count);
    tile.prefetch(first + lane, word * 4, kLanes * 4);
  }
}

// Calls `emit(vector, word, lanes)` with each of the `num_words` words of every row of the tile, tokens in lanes.
template <class Emit>
QATTN_INLINE void for_each_key_word(const CodeTile& tile, int num_words, const Emit& emit) {
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
