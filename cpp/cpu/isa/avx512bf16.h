#pragma once

#include "cpu/isa/avx512.h"

// AVX-512 as in avx512.h with products of bfloat16 (Zen 4, Cooper Lake, Sapphire Rapids and later).
namespace quantattn::cpu::avx512bf16 {

inline constexpr int kLanes = 16;

struct Native : avx512::Native {
#define QATTN_NATIVE static inline __attribute__((always_inline))

  // sum + a0 b0 + a1 b1 for the two bfloat16 of each lane; subnormals count as zero.
  QATTN_NATIVE Vector add_bfloat16_products(Vector sum, Vector a, Vector b) {
    return _mm512_castps_si512(
        _mm512_dpbf16_ps(_mm512_castsi512_ps(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }

  // table[byte & 127] for every byte, from a table of 128 bytes.
  QATTN_NATIVE Vector lookup_magnitude(const uint8_t* table, Vector bytes) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), bytes, _mm512_load_si512(table + 64));
  }
  // So that unpacking a row gives its first and its second half in order.
  QATTN_NATIVE Vector order_for_halves(Vector row) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), row);
  }

#undef QATTN_NATIVE
};

}  // namespace quantattn::cpu::avx512bf16
