#pragma once

#include "decode/ptx.cuh"
#include "prefill/task.h"

// Pieces of query rows on their way to shared memory.
namespace quantattn::cuda {

// Eight channels of a query row, 16-bit; zeros beyond its end.
__device__ __forceinline__ uint4 read_query_chunk(const PrefillTask& task, const uint16_t* row, int chunk) {
  if (8 * chunk >= task.head_dim) return {};
  if (task.can_copy_rows) return *reinterpret_cast<const uint4*>(row + 8 * chunk);
  uint16_t x[8];
  for (int i = 0; i < 8; ++i) x[i] = row[8 * chunk + i];
  const auto pair = [&](int i) { return x[i] | static_cast<uint32_t>(x[i + 1]) << 16; };
  return {pair(0), pair(2), pair(4), pair(6)};
}

// Two bfloat16 as float16, divided by a power of two.
__device__ __forceinline__ uint32_t bfloat16_to_float16(uint32_t pair, float inverse_unit) {
  return pack_float16(__uint_as_float(pair << 16) * inverse_unit, __uint_as_float(pair & 0xFFFF0000u) * inverse_unit);
}

// The exponent, as float bits, of the largest of eight bfloat16.
__device__ __forceinline__ unsigned largest_exponent(const uint4& chunk) {
  const unsigned low =
      __vmaxu2(__vmaxu2(chunk.x & 0x7FFF7FFFu, chunk.y & 0x7FFF7FFFu), __vmaxu2(chunk.z & 0x7FFF7FFFu, chunk.w & 0x7FFF7FFFu));
  return max(low & 0xFFFFu, low >> 16) >> 7;
}

// Eight bfloat16 of a row as float16, divided by a power of two, so that neither large nor tiny queries leave float16's range;
// kChunks neighbouring lanes have the row. Returns the power.
template <int kChunks>
__device__ __forceinline__ float convert_query_chunk(uint4& x) {
  unsigned exponent = largest_exponent(x);
#pragma unroll
  for (int distance = 1; distance < kChunks; distance *= 2)
    exponent = max(exponent, __shfl_xor_sync(0xFFFFFFFFu, exponent, distance));
  exponent = exponent == 255 ? 127 : min(max(exponent, 1u), 253u);
  const float inverse = __uint_as_float((254 - exponent) << 23);
  x = {bfloat16_to_float16(x.x, inverse), bfloat16_to_float16(x.y, inverse), bfloat16_to_float16(x.z, inverse),
       bfloat16_to_float16(x.w, inverse)};
  return __uint_as_float(exponent << 23);
}

}  // namespace quantattn::cuda
