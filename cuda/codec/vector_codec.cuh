#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "formats/scale.h"
#include "quantattn/kv_cache.h"

// A team of 16 lanes encodes or decodes one vector, eight neighbouring elements a lane at a time. The arithmetic is that of
// cpp/formats, so the bytes equal every other backend's.
namespace quantattn::cuda {

inline constexpr int kTeamLanes = 16, kOctet = 8;

__device__ __forceinline__ int team_lane() { return static_cast<int>(threadIdx.x % kTeamLanes); }
__device__ __forceinline__ unsigned team_mask() { return 0xFFFFu << (threadIdx.x & kTeamLanes); }

__device__ __forceinline__ float read_value(const void* data, int64_t index, DType dtype) {
  if (dtype == DType::kFloat16) return formats::float_of_half(static_cast<const uint16_t*>(data)[index]);
  if (dtype == DType::kBFloat16) return formats::float_of_bfloat16(static_cast<const uint16_t*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

__device__ __forceinline__ void write_value(void* data, int64_t index, DType dtype, float x) {
  if (dtype == DType::kFloat16)
    static_cast<uint16_t*>(data)[index] = formats::half_of_float(x);
  else if (dtype == DType::kBFloat16)
    static_cast<uint16_t*>(data)[index] = formats::bfloat16_of_float(x);
  else
    static_cast<float*>(data)[index] = x;
}

// Eight float16 as float32, by hardware; but its NaN has no sign.
__device__ __forceinline__ void widen_halves(const uint32_t (&pairs)[kOctet / 2], float (&x)[kOctet]) {
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < kOctet; i += 2) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i / 2]));
    x[i] = both.x, x[i + 1] = both.y;
    has_nan |= isnan(both.x) || isnan(both.y);
  }
  if (!has_nan) return;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] = formats::float_of_half(static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16));
}

// Eight elements, or the `count` that are left of a vector, as float32; in one read of 16 bytes where they lie so.
__device__ __forceinline__ void read_octet(const void* data, int64_t index, DType dtype, int count, float (&x)[kOctet]) {
  const uint16_t* narrow = static_cast<const uint16_t*>(data) + index;
  if (dtype != DType::kFloat32 && count == kOctet && reinterpret_cast<uintptr_t>(narrow) % 16 == 0) {
    const uint4 words = *reinterpret_cast<const uint4*>(narrow);
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
    if (dtype == DType::kFloat16)
      widen_halves(pairs, x);
    else
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x[i] = formats::float_of_bfloat16(static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16));
    return;
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] = i < count ? read_value(data, index + i, dtype) : 0.f;
}

// What is subtracted from the elements of one head. The address is formed where it is needed: registers are scarce.
struct HeadOffset {
  const Strided2D<const float>& offset;
  int64_t head;

  __device__ __forceinline__ explicit operator bool() const { return offset.data != nullptr; }
  __device__ __forceinline__ const float* at(int d) const { return offset.data + head * offset.row_stride + d; }
};

// Elements [d, d + count) of a vector, without their offsets.
__device__ __forceinline__ void read_centred(const void* values, int64_t index, DType dtype, const HeadOffset& offset, int d,
                                             int count, float (&x)[kOctet]) {
  read_octet(values, index + d, dtype, count, x);
  if (!offset) return;
  const float* from = offset.at(d);
#pragma unroll
  for (int i = 0; i < kOctet; ++i)
    if (i < count) x[i] = formats::without_offset(x[i], from[i]);
}

// Stores codes; in one write where they are eight and lie so.
template <class Code>
__device__ __forceinline__ void write_octet(Code* to, int count, const Code (&codes)[kOctet]) {
  using Word = std::conditional_t<sizeof(Code) == 1, uint2, uint4>;
  if (count == kOctet && reinterpret_cast<uintptr_t>(to) % sizeof(Word) == 0) {
    Word word;
    memcpy(&word, codes, sizeof(word));
    *reinterpret_cast<Word*>(to) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i)
    if (i < count) to[i] = codes[i];
}

__device__ __forceinline__ float octet_amax(const float (&x)[kOctet], float amax) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) amax = fmaxf(amax, formats::finite_magnitude(x[i]));
  return amax;
}

// The largest finite magnitude of a vector, in every lane of the team; `first` are the lane's first elements.
__device__ __forceinline__ float team_amax(const void* values, int64_t index, DType dtype, const HeadOffset& offset,
                                           int head_dim, const float (&first)[kOctet]) {
  float amax = octet_amax(first, 0.f);
  for (int d = kOctet * (team_lane() + kTeamLanes); d < head_dim; d += kOctet * kTeamLanes) {
    float x[kOctet];
    read_centred(values, index, dtype, offset, d, min(kOctet, head_dim - d), x);
    amax = octet_amax(x, amax);
  }
  return formats::float_of(__reduce_max_sync(team_mask(), formats::bits_of(amax)));
}

// The scale that vector [page, token, head] is encoded with; a dynamic one is computed and stored.
template <class Format>
__device__ __forceinline__ float choose_scale(const ScaleView& scale, int64_t page, int64_t token, int64_t head,
                                              const void* values, int64_t index, DType dtype, const HeadOffset& offset,
                                              int head_dim, const float (&first)[kOctet]) {
  const int64_t place = scale.offset(page, token, head);
  if (scale.granularity != ScaleGranularity::kTokenHead) return static_cast<const float*>(scale.data)[place];
  const uint16_t bits = formats::dynamic_scale<Format>(team_amax(values, index, dtype, offset, head_dim, first));
  if (team_lane() == 0) static_cast<uint16_t*>(scale.data)[place] = bits;
  return formats::float_of_half(bits);
}

// Encodes the vector at element `index` of `values`, without the offsets of its head, into element [page, token, head] of
// `codes`.
template <class Format>
__device__ __forceinline__ void encode_vector(const void* values, int64_t index, DType dtype, const HeadOffset& offset,
                                              const VectorArray& codes, const ScaleView& scale, int64_t page, int64_t token,
                                              int64_t head, int head_dim) {
  using Code = typename Format::Code;
  Code* const to = codes.at<Code>(page, token, head);
  int d = kOctet * team_lane();
  float x[kOctet];
  read_centred(values, index, dtype, offset, d, min(kOctet, head_dim - d), x);
  float multiplier = 1.f;
  if constexpr (Format::kHasScale)
    multiplier = choose_scale<Format>(scale, page, token, head, values, index, dtype, offset, head_dim, x);
  while (d < head_dim) {
    const int count = min(kOctet, head_dim - d);
    Code encoded[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if constexpr (Format::kHasScale)
        encoded[i] = formats::encode_scaled<Format>(x[i], multiplier);
      else
        encoded[i] = Format::encode(x[i]);
    }
    write_octet(to + d, count, encoded);
    d += kOctet * kTeamLanes;
    if (d < head_dim) read_centred(values, index, dtype, offset, d, min(kOctet, head_dim - d), x);
  }
}

// Decodes element [page, token, head] of `codes` into the vector at element `index` of `values`.
template <class Format>
__device__ __forceinline__ void decode_vector(const VectorArray& codes, const ScaleView& scale, const HeadOffset& offset,
                                              int64_t page, int64_t token, int64_t head, void* values, int64_t index,
                                              DType dtype, int head_dim) {
  const auto* from = codes.at<const typename Format::Code>(page, token, head);
  float multiplier = 1.f;
  if constexpr (Format::kHasScale) {
    const int64_t place = scale.offset(page, token, head);
    multiplier = scale.granularity == ScaleGranularity::kTokenHead
                     ? formats::float_of_half(static_cast<const uint16_t*>(scale.data)[place])
                     : static_cast<const float*>(scale.data)[place];
  }
  for (int d = team_lane(); d < head_dim; d += kTeamLanes) {
    const float code = Format::decode(from[d]);
    float value = Format::kHasScale ? code * multiplier : code;
    if (offset) value = __fadd_rn(value, *offset.at(d));  // never fused with the product: a CPU rounds twice
    write_value(values, index + d, dtype, value);
  }
}

}  // namespace quantattn::cuda
