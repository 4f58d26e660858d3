#pragma once

#include "cpu/simd.h"
#include "cpu/stages.h"

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

template <class N = Native>
constexpr ArithmeticStages bfloat16_stages() {
  if constexpr (requires(typename N::Vector v) { N::add_bfloat16_products(v, v, v); })
    return {bfloat16_query_row_bytes, bfloat16_pack_queries, nullptr, nullptr};
  else
    return {};
}

}  // namespace quantattn::cpu::QATTN_ISA
