#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "formats/scale.h"
#include "quantattn/kv_cache.h"

// One warp encodes or decodes one vector. The arithmetic is that of cpp/formats, so the bytes equal every other backend's.
namespace quantattn::cuda {

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

// The largest finite magnitude of a vector, in every lane.
__device__ __forceinline__ float warp_amax(const void* values, int64_t offset, DType dtype, int head_dim, int lane) {
  float amax = 0.f;
  for (int d = lane; d < head_dim; d += 32)
    amax = fmaxf(amax, formats::finite_magnitude(read_value(values, offset + d, dtype)));
  return formats::float_of(__reduce_max_sync(0xFFFFFFFFu, formats::bits_of(amax)));
}

// The scale that vector [page, token, head] is encoded with; a dynamic one is computed and stored.
template <class Format>
__device__ __forceinline__ float choose_scale(const ScaleView& scale, int64_t page, int64_t token, int64_t head,
                                              const void* values, int64_t offset, DType dtype, int head_dim, int lane) {
  const int64_t index = scale.offset(page, token, head);
  if (scale.granularity != ScaleGranularity::kTokenHead) return static_cast<const float*>(scale.data)[index];
  const uint16_t bits = formats::dynamic_scale<Format>(warp_amax(values, offset, dtype, head_dim, lane));
  if (lane == 0) static_cast<uint16_t*>(scale.data)[index] = bits;
  return formats::float_of_half(bits);
}

// Encodes the vector at `values` + `offset` into element [page, token, head] of `codes`.
template <class Format>
__device__ __forceinline__ void encode_vector(const void* values, int64_t offset, DType dtype, const VectorArray& codes,
                                              const ScaleView& scale, int64_t page, int64_t token, int64_t head, int head_dim,
                                              int lane) {
  auto* to = codes.at<typename Format::Code>(page, token, head);
  if constexpr (Format::kHasScale) {
    const float multiplier = choose_scale<Format>(scale, page, token, head, values, offset, dtype, head_dim, lane);
    for (int d = lane; d < head_dim; d += 32)
      to[d] = formats::encode_scaled<Format>(read_value(values, offset + d, dtype), multiplier);
  } else {
    for (int d = lane; d < head_dim; d += 32) to[d] = Format::encode(read_value(values, offset + d, dtype));
  }
}

template <class Format>
__device__ __forceinline__ void decode_vector(const VectorArray& codes, const ScaleView& scale, int64_t page, int64_t token,
                                              int64_t head, void* values, int64_t offset, DType dtype, int head_dim, int lane) {
  const auto* from = codes.at<const typename Format::Code>(page, token, head);
  float multiplier = 1.f;
  if constexpr (Format::kHasScale) {
    const int64_t index = scale.offset(page, token, head);
    multiplier = scale.granularity == ScaleGranularity::kTokenHead
                     ? formats::float_of_half(static_cast<const uint16_t*>(scale.data)[index])
                     : static_cast<const float*>(scale.data)[index];
  }
  for (int d = lane; d < head_dim; d += 32) {
    const float code = Format::decode(from[d]);
    write_value(values, offset + d, dtype, Format::kHasScale ? code * multiplier : code);
  }
}

}  // namespace quantattn::cuda
