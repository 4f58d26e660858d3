#pragma once

#include "cpu/byte_rows.h"
#include "cpu/int8_direct.h"
#include "cpu/unpack.h"

// Int8 as an operand of words, where the instruction set multiplies words.
namespace quantattn::cpu::QATTN_ISA {

inline constexpr int kStepBytes = kLanes * 4;  // one vector of words

struct Int8Words {
  static constexpr bool kRounds = false;

  static void keys(const CodeTile& tile, int head_dim, float, Operand* operand) {
    *operand = {operand->data, Arithmetic::kWords, kStepBytes, int64_t{head_dim} * kLanes * 2, 1.f, 128};
    char* data = static_cast<char*>(operand->data);
    const int64_t vector_stride = operand->vector_stride;
    for_each_key_word(tile, head_dim / 4, [=](int vector, int word, I32 codes) __attribute__((always_inline)) {
      char* out = data + vector * vector_stride + word * 2 * kStepBytes;
      const I16 pairs = bits<I16>(codes);
      store_words(out, bits<I32>(pairs << 8 >> 8));
      store_words(out + kStepBytes, bits<I32>(pairs >> 8));
    });
  }

  static void values(const CodeTile& tile, int head_dim, bool, Operand* operand) {
    const int num_columns = round_up(head_dim, kLanes);
    *operand = {operand->data, Arithmetic::kWords, int64_t{num_columns} * 4, kLanes * 4, 1.f, 128};
    char* out = static_cast<char*>(operand->data);
    const int64_t step_stride = operand->step_stride;
    for (int token = 0; token < tile.num_tokens; token += 2, out += step_stride) {
      const char *even = tile.row(token), *odd = tile.row(token + 1);
      for (int i = 0; i < head_dim; i += kLanes) {
        const I32 low = sign_extend(even + i);
        const I32 high = sign_extend(odd + i);
        store_words(out + i * 4, (low & 0xFFFF) | high << 16);
        tile.prefetch(token, i, kLanes);
        tile.prefetch(token + 1, i, kLanes);
      }
    }
  }
};

template <class N = Native>
struct Int8Unpack : Float32Unpack<formats::Int8> {};
template <class N>
  requires requires(typename N::Vector v) { N::add_word_products(v, v, v); }
struct Int8Unpack<N> : Int8Words {};

template <>
struct Unpack<formats::Int8> : Int8Unpack<> {};

}  // namespace quantattn::cpu::QATTN_ISA
