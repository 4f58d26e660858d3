#pragma once

#include "cpu/bfloat16_arithmetic.h"
#include "cpu/float32_direct.h"

// Both products of one-byte floats as bfloat16, which holds every one of their values: two table look-ups for 64 codes.
namespace quantattn::cpu::QATTN_ISA {

// The bfloat16 of every magnitude (a code without its sign), low and high bytes apart.
template <class Format>
struct BFloat16Table {
  alignas(kLineBytes) uint8_t low[128];
  alignas(kLineBytes) uint8_t high[128];

  BFloat16Table() {
    for (int code = 0; code < 128; ++code) {
      const float value = Format::decode(static_cast<uint8_t>(code));
      low[code] = static_cast<uint8_t>(__builtin_bit_cast(uint32_t, value) >> 16);
      high[code] = static_cast<uint8_t>(__builtin_bit_cast(uint32_t, value) >> 24);
    }
  }
};

template <class Format, class N>
struct BFloat16Direct {
  using V = typename N::Vector;
  static constexpr int kMaxRows = 4;
  static constexpr Arithmetic kArithmetic = Arithmetic::kBFloat16;
  static constexpr int kCodes = kLanes * 4;  // in a vector

  static void score(const CodeTile& tile, const ScoreJob& job) {
    int row = 0;
    for (; row + 4 <= job.num_rows; row += 4) score_rows<4>(tile, job, row);
    for (; row + 2 <= job.num_rows; row += 2) score_rows<2>(tile, job, row);
    if (row < job.num_rows) score_rows<1>(tile, job, row);
  }

  static void accumulate(const CodeTile& tile, const AccumulateJob& job) {
    PackedWeights weights;
    for (int row = 0; row < job.num_rows; ++row)
      for (int token = 0; token < kTileTokens; token += kLanes)
        store_bfloat16_pair(load(job.weights + row * kTileTokens + token), weights[row] + token,
                            weights[row] + kTileTokens + token);
    int column = 0;
    for (; column + kCodes <= job.head_dim; column += kCodes) accumulate_columns<4, true>(tile, job, weights, column);
    switch (round_up(job.head_dim - column, kLanes) / kLanes) {
      case 4:
        return accumulate_columns<4, false>(tile, job, weights, column);
      case 3:
        return accumulate_columns<3, false>(tile, job, weights, column);
      case 2:
        return accumulate_columns<2, false>(tile, job, weights, column);
      case 1:
        return accumulate_columns<1, false>(tile, job, weights, column);
    }
  }

 private:
  using PackedWeights = uint16_t[kRowBlock][2 * kTileTokens];

  static const BFloat16Table<Format>& table() {
    static const BFloat16Table<Format> table;
    return table;
  }

  struct Halves {
    V first, second;
  };
  // Codes to bfloat16, as unpacking leaves them.
  QATTN_INLINE Halves widen(const BFloat16Table<Format>& table, V codes) {
    const I32 sign = bits<I32>(codes) & static_cast<int>(0x80808080u);
    const V low = N::lookup_magnitude(table.low, codes);
    const V high = bits<V>(bits<I32>(N::lookup_magnitude(table.high, codes)) | sign);
    return {N::interleave_low(low, high), N::interleave_high(low, high)};
  }
  QATTN_INLINE void add_products(F32& sum, V a, V b) { sum = bits<F32>(N::add_bfloat16_products(bits<V>(sum), a, b)); }

  template <int kRows>
  static void score_rows(const CodeTile& tile, const ScoreJob& job, int first_row) {
    constexpr int kTokens = kLanes / kRows;
    const int64_t row_bytes = bfloat16_query_row_bytes(job.head_dim);
    const char* queries = static_cast<const char*>(job.queries) + first_row * row_bytes;
    const BFloat16Table<Format>& values = table();
    float* scores = job.scores + first_row * kTileTokens;
    for (int token = 0; token < job.num_tokens; token += kTokens) {
      F32 sums[kLanes] = {};
      int i = 0;
      for (; i + kCodes <= job.head_dim; i += kCodes)
        add_tokens<kRows, 2>(tile, token, i, kLanes, values, queries, job.head_dim, sums);
      const int num_words = (job.head_dim - i) / 4;
      if (num_words > kLanes / 2)
        add_tokens<kRows, 2>(tile, token, i, num_words, values, queries, job.head_dim, sums);
      else if (num_words > 0)
        add_tokens<kRows, 1>(tile, token, i, num_words, values, queries, job.head_dim, sums);
      store_sums<kRows>(sums, scores + token);
    }
    for (int row = 0; row < kRows; ++row, scores += kTileTokens)
      for (int token = 0; token < job.num_tokens; token += kLanes)
        store(scores + token, load(scores + token) * load(job.key_scales + token));
  }

  // kHalves vectors of bfloat16; a whole vector of codes has two.
  template <int kRows, int kHalves>
  QATTN_INLINE void add_tokens(const CodeTile& tile, int token, int i, int num_words, const BFloat16Table<Format>& table,
                               const char* queries, int head_dim, F32 (&sums)[kLanes]) {
    constexpr int kTokens = kLanes / kRows, kAtOnce = kTokens < 4 ? kTokens : 4;  // widened keys stay in registers
    const int low = bfloat16_bytes(head_dim);
#pragma GCC unroll 4
    for (int first = 0; first < kTokens; first += kAtOnce) {
      Halves keys[kAtOnce];
#pragma GCC unroll 4
      for (int t = 0; t < kAtOnce; ++t) {
        tile.prefetch(token + first + t, i, kCodes);
        keys[t] = widen(table, N::order_for_halves(bits<V>(load_words(tile.row(token + first + t) + i, num_words))));
      }
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const char* query = queries + row * 2 * low + i * 2;
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part, query += low) {
          const V first_half = bits<V>(load_words(query)), second_half = bits<V>(load_words(query + kLineBytes));
#pragma GCC unroll 4
          for (int t = 0; t < kAtOnce; ++t) {
            F32& sum = sums[(first + t) * kRows + row];
            add_products(sum, keys[t].first, first_half);
            if constexpr (kHalves == 2) add_products(sum, keys[t].second, second_half);
          }
        }
      }
    }
  }

  // kQuarters vectors of columns; a whole vector of codes has four.
  template <int kQuarters, bool kIsWhole>
  static void accumulate_columns(const CodeTile& tile, const AccumulateJob& job, const PackedWeights& weights, int column) {
    int row = 0;
    for (; row + 4 <= job.num_rows; row += 4) accumulate_rows<4, kQuarters, kIsWhole>(tile, job, weights, row, column);
    for (; row + 2 <= job.num_rows; row += 2) accumulate_rows<2, kQuarters, kIsWhole>(tile, job, weights, row, column);
    if (row < job.num_rows) accumulate_rows<1, kQuarters, kIsWhole>(tile, job, weights, row, column);
  }

  template <int kRows, int kQuarters, bool kIsWhole>
  static void accumulate_rows(const CodeTile& tile, const AccumulateJob& job, const PackedWeights& weights, int first_row,
                              int column) {
    F32 sums[kRows][kQuarters] = {};
    const BFloat16Table<Format>& values = table();
    const int num_words = kIsWhole ? kLanes : (job.head_dim - column) / 4;
    for (int token = 0; token < job.num_tokens; token += 2) {
      tile.prefetch(token, column, kCodes);
      tile.prefetch(token + 1, column, kCodes);
      V even = bits<V>(load_words(tile.row(token) + column, num_words));
      V odd = bits<V>(load_words(tile.row(token + 1) + column, num_words));
      if constexpr (!kIsWhole) {  // sums of whole vectors are put in order once; of others, only existing quarters are added up
        even = N::order_for_unpack(even);
        odd = N::order_for_unpack(odd);
      }
      const Halves low = widen(values, N::interleave_low(even, odd)), high = widen(values, N::interleave_high(even, odd));
      const V quarters[4] = {low.first, low.second, high.first, high.second};
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const uint16_t* pair = weights[first_row + r] + token;
        const V first = bits<V>(broadcast(*reinterpret_cast<const int32_t*>(pair)));
        const V second = bits<V>(broadcast(*reinterpret_cast<const int32_t*>(pair + kTileTokens)));
#pragma GCC unroll 4
        for (int q = 0; q < kQuarters; ++q) add_products(sums[r][q], quarters[q], first);
#pragma GCC unroll 4
        for (int q = 0; q < kQuarters; ++q) add_products(sums[r][q], quarters[q], second);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      V totals[kQuarters];
#pragma GCC unroll 4
      for (int q = 0; q < kQuarters; ++q) totals[q] = bits<V>(sums[r][q]);
      if constexpr (kIsWhole) N::order_quarters(totals);
      float* out = job.out + int64_t{first_row + r} * job.row_stride + column;
      for (int q = 0; q < kQuarters; ++q)
        store(out + q * kLanes, load(out + q * kLanes) * job.rescale[first_row + r] + bits<F32>(totals[q]));
    }
  }
};

// Where the instruction set multiplies bfloat16.
template <class Format, class N = Native>
struct FloatByteDirect : Float32Direct<Format> {};
template <class Format, class N>
  requires requires(typename N::Vector v, const uint8_t* table) { N::lookup_magnitude(table, v); }
struct FloatByteDirect<Format, N> : BFloat16Direct<Format, N> {};

}  // namespace quantattn::cpu::QATTN_ISA
