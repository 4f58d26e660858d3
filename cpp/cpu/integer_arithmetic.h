#pragma once

#include "cpu/product.h"

// Queries and weights as 16-bit integers with one factor per row, unpacked codes as integers: exact sums in int32, at two to
// four products per lane and instruction. Rounding a row to 16 bits costs about 2^-16 of its largest element.
namespace quantattn::cpu::QATTN_ISA {

typedef int8_t Quarter __attribute__((vector_size(kLanes)));  // the low byte of every lane

struct alignas(kLineBytes) PackedRowHeader {
  float factor;        // value of the integer 1
  int32_t correction;  // to subtract from every sum of the row
};

// Rounds to the nearest integer, for |x| < 2^22.
QATTN_INLINE I32 round_to_int(F32 x) { return bits<I32>(x + 0x1.8p23f) - broadcast(0x4B400000); }
QATTN_INLINE int32_t round_to_int(float x) { return __builtin_bit_cast(int32_t, x + 0x1.8p23f) - 0x4B400000; }

struct RowMagnitude {
  float largest, sum;  // of |x|; not finite where any x is not
};

// The largest integer that a row may use, so that no sum of its products with integers up to `limit` leaves int32.
QATTN_INLINE float largest_integer(RowMagnitude row, int limit, int count, float most) {
  const float room = 2147483000.f / static_cast<float>(limit) - static_cast<float>(count);  // each rounding adds up to 1/2
  const float bound = room * row.largest / row.sum;
  return bound < most ? bound : most;
}

// Words: pairs of int16. Unpacked keys hold elements 4 i, 4 i + 2 in one word and 4 i + 1, 4 i + 3 in the next.
template <class N>
struct WordProduct {
  using Sum = I32;
  QATTN_INLINE void add(Sum& sum, const char* a, const char* b) {
    using V = typename N::Vector;
    const I32 word = broadcast(*reinterpret_cast<const int32_t*>(a));
    sum = bits<I32>(N::add_word_products(bits<V>(sum), bits<V>(load_words(b)), bits<V>(word)));
  }
};

// Sixteen bits in two bytes: value = 256 high + low.
struct ByteSums {
  I32 high, low;
  QATTN_INLINE I32 total(const ByteSums& sums) { return (sums.high << 8) + sums.low; }
};

// A header, then head_dim words, or as many high and then low bytes; padded with zeros to whole cache lines.
QATTN_INLINE int packed_bytes(int head_dim) { return round_up(head_dim, kLineBytes); }
inline int64_t integer_query_row_bytes(int head_dim) {
  return static_cast<int64_t>(sizeof(PackedRowHeader)) + int64_t{packed_bytes(head_dim)} * 2;
}

QATTN_INLINE RowMagnitude magnitude_of(const float* values, int count) {
  F32 largest = {}, sum = {};
  for (int i = 0; i < count; i += kLanes) {
    const F32 x = load_row(values, i, count), magnitude = x < 0.f ? -x : x;
    largest = max(magnitude, largest);
    sum += magnitude;
  }
  return {max_of_lanes(largest), sum_of_lanes(sum)};
}

// What to multiply a row by; its header gets the inverse. A row that is not finite makes every result NaN.
QATTN_INLINE float start_row(RowMagnitude magnitude, float largest_int, PackedRowHeader* header) {
  *header = {magnitude.sum < __builtin_inff() ? magnitude.largest / largest_int : __builtin_nanf(""), 0};
  return header->factor > 0.f ? 1.f / header->factor : 0.f;
}

inline void word_pack_queries(const float* queries, int num_rows, int head_dim, int limit, void* packed) {
  for (int row = 0; row < num_rows; ++row, queries += head_dim) {
    char* to = static_cast<char*>(packed) + row * integer_query_row_bytes(head_dim);
    auto* words = reinterpret_cast<int16_t*>(to + sizeof(PackedRowHeader));
    const RowMagnitude magnitude = magnitude_of(queries, head_dim);
    const float inverse =
        start_row(magnitude, largest_integer(magnitude, limit, head_dim, 32767.f), reinterpret_cast<PackedRowHeader*>(to));
    for (int i = 0; i < head_dim; i += 4)
      for (int j = 0; j < 4; ++j) words[i + (j & 1) * 2 + j / 2] = static_cast<int16_t>(round_to_int(queries[i + j] * inverse));
  }
}

inline void byte_pack_queries(const float* queries, int num_rows, int head_dim, int, void* packed) {
  for (int row = 0; row < num_rows; ++row, queries += head_dim) {
    char* to = static_cast<char*>(packed) + row * integer_query_row_bytes(head_dim);
    auto* header = reinterpret_cast<PackedRowHeader*>(to);
    auto* high = reinterpret_cast<int8_t*>(to + sizeof(PackedRowHeader));
    // 127 * 256 + 127: the high byte must stay a signed byte after the low one is taken off.
    const float inverse = start_row(magnitude_of(queries, head_dim), 32639.f, header);
    I32 sum = {};
    const int padded = packed_bytes(head_dim);
    for (int i = 0; i < padded; i += kLanes) {
      const I32 value = round_to_int(load_row(queries, i, head_dim) * inverse), rounded = value + 128;
      const Quarter upper = __builtin_convertvector(rounded >> 8, Quarter);
      const Quarter lower = __builtin_convertvector((rounded & 255) - 128, Quarter);
      memcpy(high + i, &upper, sizeof upper);
      memcpy(high + padded + i, &lower, sizeof lower);
      sum += value;
    }
    for (int lane = 0; lane < kLanes; ++lane) header->correction += 128 * sum[lane];  // keys carry an offset of 128
  }
}

template <class Product, class ToInt>
QATTN_INLINE void integer_score(const ScoreJob& job, const Product& product, int num_steps, const ToInt& to_integer) {
  const int64_t row_bytes = integer_query_row_bytes(job.head_dim);
  const char* rows = static_cast<const char*>(job.queries);
  multiply(product, rows + sizeof(PackedRowHeader), row_bytes, job.num_rows, *job.keys,
           round_up(job.num_tokens, kLanes) / kLanes, num_steps,
           [&](int row, int vector, const typename Product::Sum& sum) __attribute__((always_inline)) {
             const auto* header = reinterpret_cast<const PackedRowHeader*>(rows + row * row_bytes);
             const F32 dot = to_float(to_integer(sum) - header->correction) * (header->factor * job.keys->unit);
             store(job.scores + row * kTileTokens + vector * kLanes, dot * load(job.key_scales + vector * kLanes));
           });
}

template <class N>
void word_score(const ScoreJob& job) {
  integer_score(job, WordProduct<N>{}, job.head_dim / 2, [](I32 sum) __attribute__((always_inline)) { return sum; });
}

// Weights of a block of rows as integers.
struct PackedWeights {
  alignas(64) char rows[kRowBlock][2 * kTileTokens];
  float factors[kRowBlock];
};

QATTN_INLINE RowMagnitude weight_magnitude(const float* weights) {
  F32 largest = {}, sum = {};
#pragma GCC unroll 4
  for (int token = 0; token < kTileTokens; token += kLanes) {
    const F32 w = load(weights + token), magnitude = w < 0.f ? -w : w;
    largest = max(magnitude, largest);
    sum += magnitude;
  }
  return {max_of_lanes(largest), sum_of_lanes(sum)};
}

template <class Product, class ToInt>
QATTN_INLINE void integer_accumulate(const AccumulateJob& job, const PackedWeights& weights, const float* rescale,
                                     const Product& product, int num_steps, const ToInt& to_integer) {
  multiply(product, weights.rows, 2 * kTileTokens, job.num_rows, *job.values, round_up(job.head_dim, kLanes) / kLanes,
           num_steps, [&](int row, int vector, const typename Product::Sum& sum) __attribute__((always_inline)) {
             float* out = job.out + int64_t{row} * job.row_stride + vector * kLanes;
             const F32 added = to_float(to_integer(sum)) * (weights.factors[row] * job.values->unit);
             store(out, load(out) * rescale[row] + added);
           });
}

template <class N>
void word_accumulate(const AccumulateJob& job) {
  PackedWeights packed;
  for (int row = 0; row < job.num_rows; ++row) {
    const float* weights = job.weights + row * kTileTokens;
    const RowMagnitude magnitude = weight_magnitude(weights);
    PackedRowHeader header;
    const float inverse = start_row(magnitude, largest_integer(magnitude, job.values->limit, kTileTokens, 32767.f), &header);
    packed.factors[row] = header.factor;
    for (int token = 0; token < kTileTokens; token += kLanes) {
      typedef int16_t Words __attribute__((vector_size(kLanes * 2)));
      const Words words = __builtin_convertvector(round_to_int(load(weights + token) * inverse), Words);
      memcpy(packed.rows[row] + token * 2, &words, sizeof words);
    }
  }
  integer_accumulate(job, packed, job.rescale, WordProduct<N>{}, (job.num_tokens + 1) / 2,
                     [](I32 sum) __attribute__((always_inline)) { return sum; });
}

// Packs max(sign * weight, 0).
inline void pack_byte_weights(const AccumulateJob& job, float sign, PackedWeights* packed) {
  for (int row = 0; row < job.num_rows; ++row) {
    const float* weights = job.weights + row * kTileTokens;
    PackedRowHeader header;
    const float inverse = start_row(weight_magnitude(weights), 65535.f, &header);
    packed->factors[row] = sign * header.factor;
    for (int token = 0; token < kTileTokens; token += kLanes) {
      const I32 value = round_to_int(max(load(weights + token) * (sign * inverse), F32{}));
      const Quarter high = __builtin_convertvector(value >> 8, Quarter), low = __builtin_convertvector(value, Quarter);
      memcpy(packed->rows[row] + token, &high, sizeof high);
      memcpy(packed->rows[row] + kTileTokens + token, &low, sizeof low);
    }
  }
}

template <class N = Native>
constexpr ArithmeticStages word_stages() {
  if constexpr (requires(typename N::Vector v) { N::add_word_products(v, v, v); })
    return {integer_query_row_bytes, word_pack_queries, word_score<N>, word_accumulate<N>};
  else
    return {};
}

template <class N = Native>
constexpr ArithmeticStages byte_stages() {
  if constexpr (requires(typename N::Vector v) { N::add_byte_products(v, v, v); })
    return {integer_query_row_bytes, byte_pack_queries, nullptr, nullptr};
  else
    return {};
}

}  // namespace quantattn::cpu::QATTN_ISA
