#pragma once

#include "codec/vector_codec.cuh"
#include "quantattn/quantize.h"

namespace quantattn::cuda {

inline constexpr int kAppendThreads = 128;

// A block for each token (blockIdx.x) of K (blockIdx.y 0) or V (1), both in one launch, and a team for each of its heads. A
// slot outside the cache is skipped.
template <class KFormat, class VFormat>
__global__ void __launch_bounds__(kAppendThreads, 10) append_kernel(const __grid_constant__ AppendParams p) {
  const KvCacheView& cache = p.cache;
  constexpr Strided2D<const float> no_offset;
  const int64_t token = blockIdx.x, slot = p.slot_mapping[token];
  if (slot < 0 || slot >= cache.num_pages * cache.page_size) return;
  // Slots fit 32 bits: a quotient of 64 would take as long as encoding the vector.
  const int64_t page = static_cast<uint32_t>(slot) / static_cast<uint32_t>(cache.page_size);
  const int64_t in_page = slot - page * cache.page_size;
  for (int head = static_cast<int>(threadIdx.x) / kTeamLanes; head < cache.num_kv_heads; head += kAppendThreads / kTeamLanes) {
    if (blockIdx.y == 0)
      encode_vector<KFormat>(p.k.data, p.k.offset(0, token, head), p.dtype, {cache.k_offset, head}, cache.k_codes,
                             cache.k_scale, page, in_page, head, cache.head_dim);
    else
      encode_vector<VFormat>(p.v.data, p.v.offset(0, token, head), p.dtype, {no_offset, head}, cache.v_codes, cache.v_scale,
                             page, in_page, head, cache.head_dim);
  }
}

}  // namespace quantattn::cuda
