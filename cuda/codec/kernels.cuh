#pragma once

#include "codec/vector_codec.cuh"
#include "quantattn/quantize.h"

namespace quantattn::cuda {

inline constexpr int kCodecWarps = 8;

// One warp for each vector [page, token, head], heads fastest.
template <class Visit>
__device__ __forceinline__ void visit_vector(const CodecParams& p, Visit visit) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kCodecWarps + threadIdx.x / 32;
  if (index >= p.num_pages * p.page_size * p.num_heads) return;
  const int64_t row = index / p.num_heads;
  visit(row / p.page_size, row % p.page_size, index % p.num_heads, static_cast<int>(threadIdx.x % 32));
}

template <class Format>
__global__ void __launch_bounds__(32 * kCodecWarps) quantize_kernel(const __grid_constant__ CodecParams p) {
  visit_vector(p, [&](int64_t page, int64_t token, int64_t head, int lane) {
    encode_vector<Format>(p.values.data, p.values.offset(page, token, head), p.value_dtype, p.codes, p.scale, page, token, head,
                          p.head_dim, lane);
  });
}

template <class Format>
__global__ void __launch_bounds__(32 * kCodecWarps) dequantize_kernel(const __grid_constant__ CodecParams p) {
  visit_vector(p, [&](int64_t page, int64_t token, int64_t head, int lane) {
    decode_vector<Format>(p.codes, p.scale, page, token, head, p.values.data, p.values.offset(page, token, head), p.value_dtype,
                          p.head_dim, lane);
  });
}

struct FormatKernels {
  void (*quantize)(CodecParams);
  void (*dequantize)(CodecParams);
};

}  // namespace quantattn::cuda
