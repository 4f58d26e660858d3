#pragma once

#include <immintrin.h>

#include <cstdint>

// AVX2 with FMA and F16C: 16 registers of 8 lanes.
namespace quantattn::cpu::avx2 {

inline constexpr int kLanes = 8;

struct Native {
  using Vector = __m256i;
#define QATTN_NATIVE static inline __attribute__((always_inline))

  QATTN_NATIVE Vector load_words(const void* from, int count) {
    if (count >= 8) return _mm256_loadu_si256(static_cast<const Vector*>(from));
    const Vector lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_epi32(static_cast<const int*>(from), _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
  }

  // Eight bytes to eight lanes of 32 or 16 bits; compilers take such short vectors apart.
  QATTN_NATIVE Vector sign_extend(const void* bytes) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(bytes)));
  }
  QATTN_NATIVE __m128i zero_extend(const void* bytes) {
    return _mm_cvtepu8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(bytes)));
  }

  QATTN_NATIVE float sum(__m256 x) {
    const __m128 quad = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 pair = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  QATTN_NATIVE float max(__m256 x) {
    const __m128 quad = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 pair = _mm_max_ps(quad, _mm_movehl_ps(quad, quad));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
  }

  using Halves = __m128i;
  QATTN_NATIVE __m256 half_to_float(Halves halves) { return _mm256_cvtph_ps(halves); }
  QATTN_NATIVE Vector words_to_high_halves(Halves words) { return _mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16); }
  QATTN_NATIVE void float_to_half(__m256 x, uint16_t* halves) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(halves), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  // rows[i] lane j <-> rows[j] lane i, for 32-bit lanes.
  QATTN_NATIVE void transpose(Vector (&rows)[8]) {
    Vector pairs[8], quads[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 2
    for (int g = 0; g < 8; g += 4) {
      quads[g] = _mm256_unpacklo_epi64(pairs[g], pairs[g + 2]);
      quads[g + 1] = _mm256_unpackhi_epi64(pairs[g], pairs[g + 2]);
      quads[g + 2] = _mm256_unpacklo_epi64(pairs[g + 1], pairs[g + 3]);
      quads[g + 3] = _mm256_unpackhi_epi64(pairs[g + 1], pairs[g + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      rows[c] = _mm256_permute2x128_si256(quads[c], quads[4 + c], 0x20);
      rows[4 + c] = _mm256_permute2x128_si256(quads[c], quads[4 + c], 0x31);
    }
  }

  // sum + a0 b0 + a1 b1 for the two int16 of each lane.
  QATTN_NATIVE Vector add_word_products(Vector sum, Vector a, Vector b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  }

#undef QATTN_NATIVE
};

}  // namespace quantattn::cpu::avx2
