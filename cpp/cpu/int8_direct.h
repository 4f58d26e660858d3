#pragma once

#include "cpu/float32_direct.h"
#include "cpu/integer_arithmetic.h"
#include "cpu/unpack.h"

// Both products of int8 codes in bytes, straight from the cache: sums of four byte products per lane, exact in int32. Keys
// become unsigned (code + 128) for signed queries; weights are unsigned, values signed.
namespace quantattn::cpu::QATTN_ISA {

template <class N>
struct Int8Direct {
  using V = typename N::Vector;
  static constexpr int kMaxRows = 8;  // for so few, shuffling the codes again for every two rows costs less than storing them
  static constexpr Arithmetic kArithmetic = Arithmetic::kBytes;
  static constexpr int kCodes = kLanes * 4;  // in a vector
  static constexpr int kMinTransposedRows = 4;

  static void score(const CodeTile& tile, const ScoreJob& job) {
    if (job.num_rows >= kMinTransposedRows) {
      for (int token = 0; token < job.num_tokens; token += kLanes) score_transposed(tile, job, token);
    } else {
      int row = 0;
      for (; row + 2 <= job.num_rows; row += 2) score_rows<2>(tile, job, row);
      if (row < job.num_rows) score_rows<1>(tile, job, row);
    }
    for (int row = 0; row < job.num_rows; ++row) finish_row(job, row);
  }

  static void accumulate(const CodeTile& tile, const AccumulateJob& job) {
    PackedWeights packed;
    pack_byte_weights(job, 1.f, &packed);
    accumulate_packed(tile, job, packed, job.rescale);
    if (!job.has_negative_weights) return;
    // A negative scale: its weights are multiplied on their own, because the bytes are unsigned.
    float keep[kRowBlock];
    for (float& factor : keep) factor = 1.f;
    pack_byte_weights(job, -1.f, &packed);
    accumulate_packed(tile, job, packed, keep);
  }

 private:
  template <int kRows>
  static void score_rows(const CodeTile& tile, const ScoreJob& job, int first_row) {
    constexpr int kTokens = kLanes / kRows;
    const int64_t row_bytes = integer_query_row_bytes(job.head_dim);
    const char* queries = static_cast<const char*>(job.queries) + first_row * row_bytes;
    float* scores = job.scores + first_row * kTileTokens;
    for (int token = 0; token < job.num_tokens; token += kTokens) {
      I32 sums[kLanes];
      add_tokens<kRows>(tile, token, queries, row_bytes, job.head_dim, sums);
      add_tokens<kRows>(tile, token + kTokens / 2, queries, row_bytes, job.head_dim, sums + kLanes / 2);
      store_sums<kRows>(sums, scores + token);
    }
  }

  // The sums of one row to scores, in place.
  QATTN_INLINE void finish_row(const ScoreJob& job, int row) {
    float* scores = job.scores + row * kTileTokens;
    const auto* header = reinterpret_cast<const PackedRowHeader*>(static_cast<const char*>(job.queries) +
                                                                  row * integer_query_row_bytes(job.head_dim));
    for (int token = 0; token < job.num_tokens; token += kLanes) {
      const F32 dot = to_float(load_words(scores + token) - header->correction) * header->factor;
      store(scores + token, dot * load(job.key_scales + token));
    }
  }

  // Tokens in lanes: a transposition for all rows instead of sums over lanes for each.
  static void score_transposed(const CodeTile& tile, const ScoreJob& job, int token) {
    for (int i = 0; i < job.head_dim; i += kCodes) {
      const int num_words = (job.head_dim - i) / 4;
      I32 keys[kLanes];
#pragma GCC unroll 16
      for (int t = 0; t < kLanes; ++t) {
        keys[t] = load_words(tile.row(token + t) + i, num_words) ^ static_cast<int>(0x80808080u);
        tile.prefetch(token + t, i, kCodes);
      }
      transpose(keys);
      int row = 0;
      for (; row + 4 <= job.num_rows; row += 4) add_rows<4>(keys, job, row, token, i);
      for (; row < job.num_rows; ++row) add_rows<1>(keys, job, row, token, i);
    }
  }

  template <int kRows>
  QATTN_INLINE void add_rows(const I32 (&keys)[kLanes], const ScoreJob& job, int first_row, int token, int i) {
    const int64_t row_bytes = integer_query_row_bytes(job.head_dim);
    const char* high = static_cast<const char*>(job.queries) + first_row * row_bytes + sizeof(PackedRowHeader) + i;
    const char* low = high + packed_bytes(job.head_dim);
    ByteSums sums[kRows] = {};
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
      if (i + quarter * kLanes >= job.head_dim) break;
#pragma GCC unroll 4
      for (int next = 0; next < kLanes / 4; ++next) {
        const int word = quarter * kLanes / 4 + next;
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
          const int64_t offset = row * row_bytes + word * 4;
          const I32 upper = broadcast(*reinterpret_cast<const int32_t*>(high + offset));
          const I32 lower = broadcast(*reinterpret_cast<const int32_t*>(low + offset));
          sums[row].high = bits<I32>(N::add_byte_products(bits<V>(sums[row].high), bits<V>(keys[word]), bits<V>(upper)));
          sums[row].low = bits<I32>(N::add_byte_products(bits<V>(sums[row].low), bits<V>(keys[word]), bits<V>(lower)));
        }
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      float* scores = job.scores + (first_row + row) * kTileTokens + token;
      const I32 total = ByteSums::total(sums[row]);
      store_words(scores, i == 0 ? total : load_words(scores) + total);
    }
  }

  // Half of the tokens that fill a vector of sums, so that the sums of both bytes of every query stay in registers.
  template <int kRows>
  QATTN_INLINE void add_tokens(const CodeTile& tile, int token, const char* queries, int64_t row_bytes, int head_dim,
                               I32* sums) {
    constexpr int kTokens = kLanes / kRows / 2;
    ByteSums bytes[kTokens * kRows] = {};
    const int padded = packed_bytes(head_dim);
    const auto add = [&](int i, int num_words) __attribute__((always_inline)) {
      V keys[kTokens];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        keys[t] = bits<V>(load_words(tile.row(token + t) + i, num_words) ^ static_cast<int>(0x80808080u));
        tile.prefetch(token + t, i, kCodes);
      }
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const char* query = queries + row * row_bytes + sizeof(PackedRowHeader) + i;
        const V high = bits<V>(load_words(query)), low = bits<V>(load_words(query + padded));
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          ByteSums& sum = bytes[t * kRows + row];
          sum.high = bits<I32>(N::add_byte_products(bits<V>(sum.high), keys[t], high));
          sum.low = bits<I32>(N::add_byte_products(bits<V>(sum.low), keys[t], low));
        }
      }
    };
    int i = 0;
    for (; i + kCodes <= head_dim; i += kCodes) add(i, kLanes);
    if (i < head_dim) add(i, (head_dim - i) / 4);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens * kRows; ++t) sums[t] = ByteSums::total(bytes[t]);
  }

  static void accumulate_packed(const CodeTile& tile, const AccumulateJob& job, const PackedWeights& weights,
                                const float* rescale) {
    int column = 0;
    for (; column + kCodes <= job.head_dim; column += kCodes) accumulate_columns<4, true>(tile, job, weights, rescale, column);
    switch (round_up(job.head_dim - column, kLanes) / kLanes) {
      case 4:
        return accumulate_columns<4, false>(tile, job, weights, rescale, column);
      case 3:
        return accumulate_columns<3, false>(tile, job, weights, rescale, column);
      case 2:
        return accumulate_columns<2, false>(tile, job, weights, rescale, column);
      case 1:
        return accumulate_columns<1, false>(tile, job, weights, rescale, column);
    }
  }

  // kQuarters vectors of columns; a whole vector of codes has four.
  template <int kQuarters, bool kIsWhole>
  static void accumulate_columns(const CodeTile& tile, const AccumulateJob& job, const PackedWeights& weights,
                                 const float* rescale, int column) {
    int row = 0;
    for (; row + 2 <= job.num_rows; row += 2) accumulate_rows<2, kQuarters, kIsWhole>(tile, job, weights, rescale, row, column);
    if (row < job.num_rows) accumulate_rows<1, kQuarters, kIsWhole>(tile, job, weights, rescale, row, column);
  }

  QATTN_INLINE void add_values(ByteSums& sums, const char* weights, V values) {
    const I32 high = broadcast(*reinterpret_cast<const int32_t*>(weights));
    const I32 low = broadcast(*reinterpret_cast<const int32_t*>(weights + kTileTokens));
    sums.high = bits<I32>(N::add_byte_products(bits<V>(sums.high), bits<V>(high), values));
    sums.low = bits<I32>(N::add_byte_products(bits<V>(sums.low), bits<V>(low), values));
  }

  template <int kRows, int kQuarters, bool kIsWhole>
  static void accumulate_rows(const CodeTile& tile, const AccumulateJob& job, const PackedWeights& weights,
                              const float* rescale, int first_row, int column) {
    ByteSums sums[kRows][kQuarters] = {};
    const int num_words = kIsWhole ? kLanes : (job.head_dim - column) / 4;
    for (int token = 0; token < job.num_tokens; token += 4) {
      V rows[4], quarters[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        rows[t] = bits<V>(load_words(tile.row(token + t) + column, num_words));
        // Sums of whole vectors are put in order once; of others, only the quarters that exist are added up.
        if constexpr (!kIsWhole) rows[t] = N::order_for_unpack(rows[t]);
        tile.prefetch(token + t, column, kCodes);
      }
      N::interleave_bytes(rows, quarters);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < kQuarters; ++q) add_values(sums[r][q], weights.rows[first_row + r] + token, quarters[q]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      V totals[kQuarters];
#pragma GCC unroll 4
      for (int q = 0; q < kQuarters; ++q) totals[q] = bits<V>(ByteSums::total(sums[r][q]));
      if constexpr (kIsWhole) N::order_quarters(totals);
      float* out = job.out + int64_t{first_row + r} * job.row_stride + column;
      const float factor = weights.factors[first_row + r];
      for (int q = 0; q < kQuarters; ++q)
        store(out + q * kLanes, load(out + q * kLanes) * rescale[first_row + r] + to_float(bits<I32>(totals[q])) * factor);
    }
  }
};

template <class N = Native>
struct Int8DirectOfIsa : Float32Direct<formats::Int8> {};
template <class N>
  requires requires(typename N::Vector v) { N::add_byte_products(v, v, v); }
struct Int8DirectOfIsa<N> : Int8Direct<N> {};
template <class N>
  requires(
      requires(typename N::Vector v) { N::add_word_products(v, v, v); } &&
      !requires(typename N::Vector v) { N::add_byte_products(v, v, v); })
struct Int8DirectOfIsa<N> : Float32Direct<formats::Int8> {
  static constexpr int kMaxRows = 2;  // more gain from an operand of words
};

template <>
struct Direct<formats::Int8> : Int8DirectOfIsa<> {};

}  // namespace quantattn::cpu::QATTN_ISA
