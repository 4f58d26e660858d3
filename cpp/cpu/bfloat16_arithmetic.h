#pragma once

#include "cpu/product.h"

// Queries and weights as sums of two bfloat16, which keep 16 bits of their mantissas: each product with a bfloat16 is two
// products of the hardware, added in float32.
namespace quantattn::cpu::QATTN_ISA {

typedef uint16_t HalfWords __attribute__((vector_size(kLanes * 2)));

// The nearest bfloat16, as its bits; NaN stays NaN.
QATTN_INLINE I32 bfloat16_bits(F32 x) {
  const I32 word = bits<I32>(x), last_bit = word >> 16 & 1;
  return (x == x ? word + 0x7FFF + last_bit : word | 0x400000) >> 16;
}

// x = high + low; low is zero where x is not finite.
QATTN_INLINE void store_bfloat16_pair(F32 x, void* high, void* low) {
  const I32 upper = bfloat16_bits(x);
  const F32 rest = x - bits<F32>(upper << 16);
  const HalfWords high_words = __builtin_convertvector(upper, HalfWords);
  const HalfWords low_words = __builtin_convertvector(bfloat16_bits(rest == rest ? rest : F32{}), HalfWords);
  memcpy(high, &high_words, sizeof high_words);
  memcpy(low, &low_words, sizeof low_words);
}

// A row: high parts, then low parts, each padded with zeros to whole cache lines.
QATTN_INLINE int bfloat16_bytes(int head_dim) { return round_up(head_dim, kLineBytes) * 2; }
inline int64_t bfloat16_query_row_bytes(int head_dim) { return int64_t{bfloat16_bytes(head_dim)} * 2; }

inline void bfloat16_pack_queries(const float* queries, int num_rows, int head_dim, int, void* packed) {
  for (int row = 0; row < num_rows; ++row, queries += head_dim) {
    char* high = static_cast<char*>(packed) + row * bfloat16_query_row_bytes(head_dim);
    const int padded = round_up(head_dim, kLineBytes);
    for (int i = 0; i < padded; i += kLanes)
      store_bfloat16_pair(load_row(queries, i, head_dim), high + i * 2, high + (padded + i) * 2);
  }
}

template <class N>
struct BFloat16Product {
  using Sum = F32;
  QATTN_INLINE void add(Sum& sum, const char* a, const char* b) {
    using V = typename N::Vector;
    const I32 word = broadcast(*reinterpret_cast<const int32_t*>(a));
    sum = bits<F32>(N::add_bfloat16_products(bits<V>(sum), bits<V>(load_words(b)), bits<V>(word)));
  }
};

// Whether some query is more than its high part.
inline bool has_low_parts(const ScoreJob& job) {
  const int64_t row_bytes = bfloat16_query_row_bytes(job.head_dim);
  I32 found = {};
  for (int row = 0; row < job.num_rows; ++row) {
    const char* low = static_cast<const char*>(job.queries) + row * row_bytes + row_bytes / 2;
    for (int i = 0; i < row_bytes / 2; i += kLanes * 4) found |= load_words(low + i);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (found[lane] != 0) return true;
  return false;
}

template <class N>
void bfloat16_score(const ScoreJob& job) {
  const int64_t row_bytes = bfloat16_query_row_bytes(job.head_dim);
  const char* high = static_cast<const char*>(job.queries);
  const int num_vectors = round_up(job.num_tokens, kLanes) / kLanes, num_steps = job.head_dim / 2;
  const auto at = [&](int row, int vector)
                      __attribute__((always_inline)) { return job.scores + row * kTileTokens + vector * kLanes; };
  const bool has_low = has_low_parts(job);
  if (has_low)
    multiply(BFloat16Product<N>{}, high + row_bytes / 2, row_bytes, job.num_rows, *job.keys, num_vectors, num_steps,
             [&](int row, int vector, F32 sum) __attribute__((always_inline)) { store(at(row, vector), sum); });
  multiply(BFloat16Product<N>{}, high, row_bytes, job.num_rows, *job.keys, num_vectors, num_steps,
           [&](int row, int vector, F32 sum) __attribute__((always_inline)) {
             float* scores = at(row, vector);
             const F32 dot = has_low ? sum + load(scores) : sum;
             store(scores, dot * load(job.key_scales + vector * kLanes));
           });
}

template <class N = Native>
constexpr ArithmeticStages bfloat16_stages() {
  if constexpr (requires(typename N::Vector v) { N::add_bfloat16_products(v, v, v); })
    return {bfloat16_query_row_bytes, bfloat16_pack_queries, bfloat16_score<N>, nullptr};
  else
    return {};
}

}  // namespace quantattn::cpu::QATTN_ISA
