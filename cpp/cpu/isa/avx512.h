#pragma once

#include <immintrin.h>

#include <cstdint>

// AVX-512 F, BW, VL, DQ, VNNI and VBMI (Ice Lake, Zen 4 and later): 32 registers of 16 lanes.
namespace quantattn::cpu::avx512 {

inline constexpr int kLanes = 16;

struct Native {
  using Vector = __m512i;
#define QATTN_NATIVE static inline __attribute__((always_inline))

  QATTN_NATIVE Vector load_words(const void* from, int count) {
    // No wider than needed: a load that reaches into another cache line costs two.
    const unsigned mask = count >= 16 ? 0xFFFFu : (1u << count) - 1;
    if (count <= 4) return _mm512_zextsi128_si512(_mm_maskz_loadu_epi32(static_cast<__mmask8>(mask), from));
    if (count <= 8) return _mm512_zextsi256_si512(_mm256_maskz_loadu_epi32(static_cast<__mmask8>(mask), from));
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from);
  }

  // Sixteen bytes to sixteen lanes of 32 or 16 bits; compilers take such short vectors apart.
  QATTN_NATIVE Vector sign_extend(const void* bytes) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
  }
  QATTN_NATIVE __m256i zero_extend(const void* bytes) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
  }

  QATTN_NATIVE float sum(__m512 x) { return _mm512_reduce_add_ps(x); }
  QATTN_NATIVE float max(__m512 x) { return _mm512_reduce_max_ps(x); }

  QATTN_NATIVE __m512 round(__m512 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^n for an integer n; zero where that is too small.
  QATTN_NATIVE __m512 times_power_of_two(__m512 x, __m512 n) { return _mm512_scalef_ps(x, n); }

  using Halves = __m256i;
  QATTN_NATIVE __m512 half_to_float(Halves halves) { return _mm512_cvtph_ps(halves); }
  QATTN_NATIVE Vector words_to_high_halves(Halves words) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16); }
  QATTN_NATIVE void float_to_half(__m512 x, uint16_t* halves) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  // rows[i] lane j <-> rows[j] lane i, for 32-bit lanes.
  QATTN_NATIVE void transpose(Vector (&rows)[16]) {
    Vector pairs[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    Vector quads[16];  // quads[4 g + c]: column c of each 4-column lane, rows 4 g to 4 g + 3
#pragma GCC unroll 4
    for (int g = 0; g < 16; g += 4) {
      quads[g] = _mm512_unpacklo_epi64(pairs[g], pairs[g + 2]);
      quads[g + 1] = _mm512_unpackhi_epi64(pairs[g], pairs[g + 2]);
      quads[g + 2] = _mm512_unpacklo_epi64(pairs[g + 1], pairs[g + 3]);
      quads[g + 3] = _mm512_unpackhi_epi64(pairs[g + 1], pairs[g + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const Vector even_low = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0x88);
      const Vector odd_low = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0xDD);
      const Vector even_high = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0x88);
      const Vector odd_high = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0xDD);
      rows[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
      rows[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
      rows[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
      rows[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
    }
  }

  // Lane i: the sum of the lanes of vectors[i], by `add`.
  template <class Add>
  QATTN_NATIVE Vector sums_of_lanes(const Vector (&vectors)[16], const Add& add) {
    Vector quads[4];  // in each 128-bit lane the sums of four vectors
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vector* v = vectors + 4 * i;
      const Vector pair01 = add(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
      const Vector pair23 = add(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
      quads[i] = add(_mm512_unpacklo_epi64(pair01, pair23), _mm512_unpackhi_epi64(pair01, pair23));
    }
    const Vector low = add(_mm512_shuffle_i32x4(quads[0], quads[1], 0x88), _mm512_shuffle_i32x4(quads[0], quads[1], 0xDD));
    const Vector high = add(_mm512_shuffle_i32x4(quads[2], quads[3], 0x88), _mm512_shuffle_i32x4(quads[2], quads[3], 0xDD));
    return add(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xDD));
  }

  // sum + a0 b0 + a1 b1 for the two int16 of each lane.
  QATTN_NATIVE Vector add_word_products(Vector sum, Vector a, Vector b) { return _mm512_dpwssd_epi32(sum, a, b); }
  // sum + the four products of unsigned bytes of a and signed bytes of b in each lane.
  QATTN_NATIVE Vector add_byte_products(Vector sum, Vector a, Vector b) { return _mm512_dpbusd_epi32(sum, a, b); }

  // Unpacking interleaves within 128-bit lanes. After this the four results of a 64-byte row are its quarters in order.
  QATTN_NATIVE Vector order_for_unpack(Vector row) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), row);
  }
  // Four rows of bytes to lanes of four bytes, one of each row.
  QATTN_NATIVE void interleave_bytes(const Vector (&rows)[4], Vector (&quarters)[4]) {
    const Vector low01 = _mm512_unpacklo_epi8(rows[0], rows[1]), high01 = _mm512_unpackhi_epi8(rows[0], rows[1]);
    const Vector low23 = _mm512_unpacklo_epi8(rows[2], rows[3]), high23 = _mm512_unpackhi_epi8(rows[2], rows[3]);
    quarters[0] = _mm512_unpacklo_epi16(low01, low23);
    quarters[1] = _mm512_unpackhi_epi16(low01, low23);
    quarters[2] = _mm512_unpacklo_epi16(high01, high23);
    quarters[3] = _mm512_unpackhi_epi16(high01, high23);
  }

  // Sums of the quarters' lanes, which interleave_bytes left in the order of unpacking, to the order of the columns.
  QATTN_NATIVE void order_quarters(Vector (&q)[4]) {
    const Vector low01 = _mm512_shuffle_i32x4(q[0], q[1], 0x44), high01 = _mm512_shuffle_i32x4(q[0], q[1], 0xEE);
    const Vector low23 = _mm512_shuffle_i32x4(q[2], q[3], 0x44), high23 = _mm512_shuffle_i32x4(q[2], q[3], 0xEE);
    q[0] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    q[1] = _mm512_shuffle_i32x4(low01, low23, 0xDD);
    q[2] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    q[3] = _mm512_shuffle_i32x4(high01, high23, 0xDD);
  }

  // table[byte] for every byte, from a table of 256 bytes.
  QATTN_NATIVE Vector lookup(const uint8_t* table, Vector bytes) {
    const Vector positive = _mm512_permutex2var_epi8(_mm512_load_si512(table), bytes, _mm512_load_si512(table + 64));
    const Vector negative = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), bytes, _mm512_load_si512(table + 192));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), positive, negative);
  }
  // Two rows of bytes to lanes of two bytes of each, alternating: the first and the second half of each 128-bit lane.
  QATTN_NATIVE Vector interleave_low(Vector a, Vector b) { return _mm512_unpacklo_epi8(a, b); }
  QATTN_NATIVE Vector interleave_high(Vector a, Vector b) { return _mm512_unpackhi_epi8(a, b); }
  // Largest of the low seven bits of bytes, doubled; start with zeros.
  QATTN_NATIVE Vector max_magnitude(Vector largest, Vector bytes) {
    return _mm512_max_epu8(largest, _mm512_add_epi8(bytes, bytes));
  }
  QATTN_NATIVE int magnitude_of(Vector largest) {
    const __m256i half = _mm256_max_epu8(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
    const __m128i quarter = _mm_max_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i inverted = _mm_xor_si128(quarter, _mm_set1_epi8(-1));
    const __m128i pairs = _mm_min_epu8(inverted, _mm_srli_epi16(inverted, 8));  // minpos finds the smallest word
    return (255 - (_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_and_si128(pairs, _mm_set1_epi16(255)))) & 255)) / 2;
  }

#undef QATTN_NATIVE
};

}  // namespace quantattn::cpu::avx512
