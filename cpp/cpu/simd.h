#pragma once

// Vectors of 32-bit lanes, by the compilers' vector extension: the operators + - * / < ?: work lane by lane and become the
// instructions of the instruction set that the source file is compiled for. Included only by stage sources, which define
// QATTN_ISA, the namespace and header name of their instruction set; everything here is inlined, so that no function
// compiled for one instruction set can be linked into another's code.
#include <cstdint>
#include <cstring>

#define QATTN_STRINGIZE_TOKEN(text) #text
#define QATTN_STRINGIZE(text) QATTN_STRINGIZE_TOKEN(text)
// clang-format off: it would put blanks into the path
#include QATTN_STRINGIZE(cpu/isa/QATTN_ISA.h)
// clang-format on

#define QATTN_INLINE static inline __attribute__((always_inline))

namespace quantattn::cpu::QATTN_ISA {

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef int16_t I16 __attribute__((vector_size(kLanes * 4)));  // two in each 32-bit lane

QATTN_INLINE F32 load(const float* from) {
  F32 x;
  memcpy(&x, from, sizeof x);
  return x;
}
QATTN_INLINE void store(float* to, F32 x) { memcpy(to, &x, sizeof x); }
QATTN_INLINE I32 load_words(const void* from) {
  I32 x;
  memcpy(&x, from, sizeof x);
  return x;
}
QATTN_INLINE void store_words(void* to, I32 x) { memcpy(to, &x, sizeof x); }
QATTN_INLINE F32 broadcast(float x) { return F32{} + x; }
QATTN_INLINE I32 broadcast(int32_t x) { return I32{} + x; }
QATTN_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
// The same bits as another vector type, the instruction set's own included.
template <class To, class From>
QATTN_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, x);
}
QATTN_INLINE I32 to_int(F32 x) { return __builtin_convertvector(x, I32); }
QATTN_INLINE F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }

// The first `count` words, zeros after them; nothing past them is read.
template <class N = Native>
QATTN_INLINE I32 load_words(const void* from, int count) {
  if constexpr (requires { N::load_words(from, count); }) {
    return bits<I32>(N::load_words(from, count));
  } else {
    if (count >= kLanes) return load_words(from);
    I32 x = {};
    memcpy(&x, from, static_cast<size_t>(count) * 4);
    return x;
  }
}

// The vector at element `i` of a row of `count`; zeros past its end.
QATTN_INLINE F32 load_row(const float* row, int i, int count) {
  return i < count ? bits<F32>(load_words(row + i, count - i)) : F32{};
}

template <class N = Native>
QATTN_INLINE void transpose(I32 (&rows)[kLanes]) {
  if constexpr (requires(typename N::Vector(&native)[kLanes]) { N::transpose(native); }) {
    typename N::Vector native[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) native[i] = bits<typename N::Vector>(rows[i]);
    N::transpose(native);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = bits<I32>(native[i]);
  } else {
    I32 columns[kLanes];
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) columns[j][i] = rows[i][j];
    for (int i = 0; i < kLanes; ++i) rows[i] = columns[i];
  }
}

// Lane i: the sum of the lanes of vectors[i].
template <class Lanes, class N = Native>
QATTN_INLINE Lanes sums_of_lanes(const Lanes (&vectors)[kLanes]) {
  const auto add = [](auto a, auto b)
                       __attribute__((always_inline)) { return bits<decltype(a)>(bits<Lanes>(a) + bits<Lanes>(b)); };
  if constexpr (requires(const typename N::Vector(&native)[kLanes]) { N::sums_of_lanes(native, add); }) {
    typename N::Vector native[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) native[i] = bits<typename N::Vector>(vectors[i]);
    return bits<Lanes>(N::sums_of_lanes(native, add));
  } else {
    I32 columns[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) columns[i] = bits<I32>(vectors[i]);
    transpose(columns);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) columns[i] = add(columns[i], columns[i + width]);
    return bits<Lanes>(columns[0]);
  }
}

QATTN_INLINE I32 lane_numbers() {
  I32 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

template <class N = Native>
QATTN_INLINE float sum_of_lanes(F32 x) {
  if constexpr (requires { N::sum(x); }) return N::sum(x);
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
template <class N = Native>
QATTN_INLINE float max_of_lanes(F32 x) {
  if constexpr (requires { N::max(x); }) return N::max(x);
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// exp(x) for x <= 0, to about 1 ulp: x = n ln 2 + r, exp(r) by a polynomial. Below -87 the result is 0; NaN stays NaN.
QATTN_INLINE F32 exp_by_bits(F32 x) {
  const F32 clamped = x < -87.f ? broadcast(-87.f) : x;
  const F32 shifted = clamped * 1.44269504089f + 0x1.8p23f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
  const F32 n = shifted - 0x1.8p23f;
  F32 r = clamped - n * 0.693359375f;  // ln 2 in two parts: the first product is exact
  r = r + n * 2.12194440e-4f;
  F32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const F32 power = bits<F32>((bits<I32>(shifted) << 23) + 0x3F800000);
  return x < -87.f ? F32{} : p * power;
}

// The same as 2^(n + r), n + r = x / ln 2, in half the instructions where there are some for n. The coefficients are the
// minimax ones for |r| <= 1/2.
template <class N>
QATTN_INLINE F32 exp_by_powers_of_two(F32 x) {
  constexpr float kInverseLn2 = 1.44269504089f;
  const F32 clamped = x < -150.f ? broadcast(-150.f) : x;  // infinity would become NaN
  const F32 n = bits<F32>(N::round(clamped * kInverseLn2));
  const F32 r = clamped * kInverseLn2 - n;
  F32 p = r * 0x1.41d334p-13f + 0x1.5f456ap-10f;
  p = p * r + 0x1.3b2dbcp-7f;
  p = p * r + 0x1.c6aed4p-5f;
  p = p * r + 0x1.ebfbdap-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.f;
  return bits<F32>(N::times_power_of_two(p, n));
}

template <class N = Native>
QATTN_INLINE F32 exp_nonpositive(F32 x) {
  if constexpr (requires { N::times_power_of_two(x, x); })
    return exp_by_powers_of_two<N>(x);
  else
    return exp_by_bits(x);
}

// tanh(x) = (1 - e) / (1 + e) with e = exp(-2 |x|); near zero, where that cancels, its series.
QATTN_INLINE F32 tanh_of(F32 x) {
  const F32 magnitude = x < 0.f ? -x : x;
  const F32 e = exp_nonpositive(-2.f * magnitude);
  const F32 large = (1.f - e) / (1.f + e);
  const F32 square = x * x;
  const F32 small = magnitude * (1.f + square * (-0.333333333f + square * (0.133333333f - square * 0.0539682540f)));
  const F32 result = magnitude < 0.25f ? small : large;
  return x < 0.f ? -result : result;
}

}  // namespace quantattn::cpu::QATTN_ISA
