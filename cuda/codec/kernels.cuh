#pragma once

#include "codec/vector_codec.cuh"
#include "quantattn/quantize.h"

namespace quantattn::cuda {

inline constexpr int kCodecThreads = 256, kCodecTeams = kCodecThreads / kTeamLanes;
// Registers are shared out for so many blocks of a multiprocessor. Left to itself (0), the assembler spills on sm_80 and
// sm_120; on sm_90 its own choice is what was measured.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
inline constexpr int kCodecBlocks = 0;
#else
inline constexpr int kCodecBlocks = 4;
#endif

// One team for each vector [page, token, head]: blockIdx.x counts those of a page, heads fastest, and blockIdx.y pages.
template <class Visit>
__device__ __forceinline__ void visit_vectors(const CodecParams& p, Visit visit) {
  const unsigned index = blockIdx.x * kCodecTeams + threadIdx.x / kTeamLanes, num_heads = static_cast<unsigned>(p.num_heads);
  if (index >= static_cast<unsigned>(p.page_size) * num_heads) return;
  const unsigned token = index / num_heads, head = index - token * num_heads;
  for (int64_t page = blockIdx.y; page < p.num_pages; page += gridDim.y) visit(page, token, head);
}

template <class Format>
__global__ void __launch_bounds__(kCodecThreads, kCodecBlocks) quantize_kernel(const __grid_constant__ CodecParams p) {
  visit_vectors(p, [&](int64_t page, int64_t token, int64_t head) {
    encode_vector<Format>(p.values.data, p.values.offset(page, token, head), p.value_dtype, {p.offset, head}, p.codes, p.scale,
                          page, token, head, p.head_dim);
  });
}

template <class Format>
__global__ void __launch_bounds__(kCodecThreads, kCodecBlocks) dequantize_kernel(const __grid_constant__ CodecParams p) {
  visit_vectors(p, [&](int64_t page, int64_t token, int64_t head) {
    decode_vector<Format>(p.codes, p.scale, {p.offset, head}, page, token, head, p.values.data,
                          p.values.offset(page, token, head), p.value_dtype, p.head_dim);
  });
}

struct FormatKernels {
  void (*quantize)(CodecParams);
  void (*dequantize)(CodecParams);
};

}  // namespace quantattn::cuda
