#pragma once

#include "cpu/stages.h"
#include "cpu/widen.h"

// Both products in float32 on codes that are widened in registers: exact codes of every format, nothing stored in between.
namespace quantattn::cpu::QATTN_ISA {

// Stores sums[token][row], each still spread over lanes, to row `row` and token `token` of the scores. A row has
// kLanes / kRows tokens (kRows is a power of two).
template <int kRows, class Sum>
QATTN_INLINE void store_sums(const Sum (&sums)[kLanes], void* scores) {
  constexpr int kTokens = kLanes / kRows;
  Sum by_row[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) by_row[i] = sums[i % kTokens * kRows + i / kTokens];
  const Sum totals = sums_of_lanes(by_row);
  for (int row = 0; row < kRows; ++row)
    memcpy(static_cast<float*>(scores) + row * kTileTokens, reinterpret_cast<const char*>(&totals) + row * kTokens * 4,
           kTokens * 4);
}

template <class Format>
struct Float32Direct {
  using Code = typename Format::Code;
  static constexpr int kCodeBytes = static_cast<int>(sizeof(Code));
  static constexpr int kMaxRows = 12;  // widening again for every four rows costs less than a transposed copy
  static constexpr Arithmetic kArithmetic = Arithmetic::kFloat32;

  static void score(const CodeTile& tile, const ScoreJob& job) {
    int row = 0;
    for (; row + 4 <= job.num_rows; row += 4) score_rows<4>(tile, job, row);
    for (; row + 2 <= job.num_rows; row += 2) score_rows<2>(tile, job, row);
    if (row < job.num_rows) score_rows<1>(tile, job, row);
  }

  static void accumulate(const CodeTile& tile, const AccumulateJob& job) {
    constexpr int kColumns = 8;  // vectors of columns whose sums of one row stay in registers
    int row = 0;
    for (; row + 4 <= job.num_rows; row += 4) accumulate_rows<4, kColumns / 2>(tile, job, row);
    for (; row + 2 <= job.num_rows; row += 2) accumulate_rows<2, kColumns / 2>(tile, job, row);
    if (row < job.num_rows) accumulate_rows<1, kColumns>(tile, job, row);
  }

 private:
  template <int kRows>
  static void score_rows(const CodeTile& tile, const ScoreJob& job, int first_row) {
    constexpr int kTokens = kLanes / kRows;
    const float* queries = static_cast<const float*>(job.queries) + first_row * job.head_dim;
    float* scores = job.scores + first_row * kTileTokens;
    for (int token = 0; token < job.num_tokens; token += kTokens) {
      F32 sums[kLanes] = {};
      const int whole = job.head_dim / kLanes * kLanes;
      for (int i = 0; i < whole; i += kLanes) add_products<kRows>(queries + i, job.head_dim, tile, token, i, kLanes, sums);
      if (whole < job.head_dim)
        add_products<kRows>(queries + whole, job.head_dim, tile, token, whole, job.head_dim - whole, sums);
      store_sums<kRows>(sums, scores + token);
    }
    for (int row = 0; row < kRows; ++row, scores += kTileTokens)
      for (int token = 0; token < job.num_tokens; token += kLanes)
        store(scores + token, load(scores + token) * Widen<Format>::kUnit * load(job.key_scales + token));
  }

  template <int kRows>
  QATTN_INLINE void add_products(const float* queries, int row_stride, const CodeTile& tile, int token, int i, int count,
                                 F32 (&sums)[kLanes]) {
    constexpr int kTokens = kLanes / kRows;
    F32 keys[kTokens];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      keys[t] = load_some<Format>(reinterpret_cast<const Code*>(tile.row(token + t)) + i, count);
      tile.prefetch(token + t, i * kCodeBytes, kLanes * kCodeBytes);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const F32 query = count == kLanes ? load(queries + row * row_stride) : load_row(queries + row * row_stride, 0, count);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) sums[t * kRows + row] += query * keys[t];
    }
  }

  template <int kRows, int kColumns>
  static void accumulate_rows(const CodeTile& tile, const AccumulateJob& job, int first_row) {
    int column = 0;
    for (; column + kColumns * kLanes <= job.head_dim; column += kColumns * kLanes)
      accumulate_block<kRows, kColumns>(tile, job, first_row, column, kLanes);
    for (; column + kLanes <= job.head_dim; column += kLanes) accumulate_block<kRows, 1>(tile, job, first_row, column, kLanes);
    if (column < job.head_dim) accumulate_block<kRows, 1>(tile, job, first_row, column, job.head_dim - column);
  }

  template <int kRows, int kColumns>
  QATTN_INLINE void accumulate_block(const CodeTile& tile, const AccumulateJob& job, int first_row, int column, int count) {
    F32 sums[kRows][kColumns] = {};
    const float* weights = job.weights + first_row * kTileTokens;
    for (int token = 0; token < job.num_tokens; ++token) {
      const auto* codes = reinterpret_cast<const Code*>(tile.row(token)) + column;
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const F32 value = load_some<Format>(codes + c * kLanes, count);
        tile.prefetch(token, (column + c * kLanes) * kCodeBytes, kLanes * kCodeBytes);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) sums[row][c] += weights[row * kTileTokens + token] * value;
      }
    }
    for (int row = 0; row < kRows; ++row) {
      float* out = job.out + int64_t{first_row + row} * job.row_stride + column;
      for (int c = 0; c < kColumns; ++c)
        store(out + c * kLanes, load(out + c * kLanes) * job.rescale[first_row + row] + sums[row][c] * Widen<Format>::kUnit);
    }
  }
};

}  // namespace quantattn::cpu::QATTN_ISA
