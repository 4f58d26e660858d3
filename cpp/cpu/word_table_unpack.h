#pragma once

#include "cpu/byte_rows.h"
#include "cpu/unpack.h"

// One-byte floats (sign, then a magnitude that grows with the code) as int16 operands, by table. The integers of a tile count
// units of 2^-12 of its largest power of two, so codes far below the tile's largest are rounded: about 2^-14 of the largest.
namespace quantattn::cpu::QATTN_ISA {

// For one largest magnitude: the integer of every code, low and high bytes apart.
struct WordTable {
  alignas(64) uint8_t low[256];
  alignas(64) uint8_t high[256];
  float unit;
};

template <class Format>
struct WordTables {
  WordTable of_magnitude[128];  // by the largest code of the tile, its sign off

  WordTables() {
    for (int largest = 0; largest < 128; ++largest) fill(largest, &of_magnitude[largest]);
  }

  static void fill(int largest, WordTable* table) {
    const float bound = Format::decode(static_cast<uint8_t>(largest));
    table->unit = 1.f;
    if (!(bound < __builtin_inff())) return;  // such a tile is multiplied in float32
    table->unit = bound > 0.f ? __builtin_ldexpf(1.f, __builtin_ilogbf(bound) - 12) : 1.f;
    for (int code = 0; code < 256; ++code) {
      const bool is_used = (code & 127) <= largest;
      const float value = is_used ? Format::decode(static_cast<uint8_t>(code)) / table->unit : 0.f;
      const auto word = static_cast<uint16_t>(static_cast<int16_t>(__builtin_rintf(value)));
      table->low[code] = static_cast<uint8_t>(word);
      table->high[code] = static_cast<uint8_t>(word >> 8);
    }
  }

  static const WordTable& of(int largest) {
    static const WordTables tables;
    return tables.of_magnitude[largest];
  }
};

template <class Format, class N>
struct WordTableUnpack {
  using V = typename N::Vector;
  static constexpr bool kRounds = true;

  static int largest_magnitude(const CodeTile& tile, int head_dim) {
    V largest = bits<V>(I32{});
    for (int token = 0; token < tile.num_tokens; ++token) largest = larger_magnitudes(tile, token, head_dim, largest);
    return N::magnitude_of(largest);
  }

  // Whether every token's largest magnitude is within a factor of four of the tile's, or zero. A rounded value is off by at
  // most 2^-13 of the tile's largest, so by 2^-11 of its own token's: a large token that nobody attends to spoils no other.
  static bool tokens_are_alike(const CodeTile& tile, int head_dim, int largest) {
    constexpr float kSpread = 4.f;
    const float least = Format::decode(static_cast<uint8_t>(largest)) / kSpread;
    for (int token = 0; token < tile.num_tokens; ++token) {
      const int magnitude = N::magnitude_of(larger_magnitudes(tile, token, head_dim, bits<V>(I32{})));
      if (magnitude != 0 && Format::decode(static_cast<uint8_t>(magnitude)) < least) return false;
    }
    return true;
  }

  static void keys(const CodeTile& tile, int head_dim, float coarsest_unit, Operand* operand) {
    const int largest = largest_magnitude(tile, head_dim);
    const WordTable& table = WordTables<Format>::of(largest);
    if (!(Format::decode(static_cast<uint8_t>(largest)) < __builtin_inff()) || !(table.unit <= coarsest_unit))
      return Float32Unpack<Format>::keys(tile, head_dim, coarsest_unit, operand);
    *operand = {operand->data, Arithmetic::kWords, kLanes * 4, int64_t{head_dim} * kLanes * 2, table.unit, kWordLimit};
    char* data = static_cast<char*>(operand->data);
    const int64_t vector_stride = operand->vector_stride;
    for_each_key_word(tile, head_dim / 4, [=, &table](int vector, int word, I32 codes) __attribute__((always_inline)) {
      char* out = data + vector * vector_stride + word * 2 * kLanes * 4;
      typedef uint16_t U16 __attribute__((vector_size(kLanes * 4)));
      const U16 low = bits<U16>(N::lookup(table.low, bits<V>(codes))), high = bits<U16>(N::lookup(table.high, bits<V>(codes)));
      store_words(out, bits<I32>((low & 0x00FF) | high << 8));
      store_words(out + kLanes * 4, bits<I32>(low >> 8 | (high & 0xFF00)));
    });
  }

  static void values(const CodeTile& tile, int head_dim, bool exact, Operand* operand) {
    const int largest = largest_magnitude(tile, head_dim);
    if (exact || !(Format::decode(static_cast<uint8_t>(largest)) < __builtin_inff()) ||
        !tokens_are_alike(tile, head_dim, largest))
      return Float32Unpack<Format>::values(tile, head_dim, exact, operand);
    const WordTable& table = WordTables<Format>::of(largest);
    const int num_vectors = round_up(head_dim, kLanes) / kLanes;
    *operand = {operand->data, Arithmetic::kWords, int64_t{num_vectors} * kLanes * 4, kLanes * 4, table.unit, kWordLimit};
    char* out = static_cast<char*>(operand->data);
    const int64_t step_stride = operand->step_stride;
    for (int token = 0; token < tile.num_tokens; token += 2, out += step_stride)
      for (int byte = 0; byte < head_dim; byte += kLanes * 4) {
        const V even = value_row(tile, token, byte, head_dim), odd = value_row(tile, token + 1, byte, head_dim);
        V quarters[4];
        look_up_pairs(table, N::interleave_low(even, odd), quarters);
        look_up_pairs(table, N::interleave_high(even, odd), quarters + 2);
      // Past the last column they write what the next step overwrites, or spare room.
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store_words(out + (byte / kLanes + i) * (kLanes * 4), bits<I32>(quarters[i]));
      }
  }

 private:
  QATTN_INLINE V larger_magnitudes(const CodeTile& tile, int token, int head_dim, V largest) {
    for (int byte = 0; byte < head_dim; byte += kLanes * 4) {
      const I32 codes = load_words(tile.row(token) + byte, (head_dim - byte) / 4);
      largest = N::max_magnitude(largest, bits<V>(codes));
    }
    return largest;
  }
  QATTN_INLINE V value_row(const CodeTile& tile, int token, int byte, int head_dim) {
    tile.prefetch(token, byte, kLanes * 4);
    return N::order_for_unpack(bits<V>(load_words(tile.row(token) + byte, (head_dim - byte) / 4)));
  }
  QATTN_INLINE void look_up_pairs(const WordTable& table, V codes, V* pairs) {
    const V low = N::lookup(table.low, codes), high = N::lookup(table.high, codes);
    pairs[0] = N::interleave_low(low, high);
    pairs[1] = N::interleave_high(low, high);
  }
};

// Where the instruction set has the table look-up.
template <class Format, class N = Native>
struct FloatByteUnpack : Float32Unpack<Format> {};
template <class Format, class N>
  requires requires(typename N::Vector v, const uint8_t* table) { N::lookup(table, v); }
struct FloatByteUnpack<Format, N> : WordTableUnpack<Format, N> {};

}  // namespace quantattn::cpu::QATTN_ISA
