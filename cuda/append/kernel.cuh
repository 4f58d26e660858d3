#pragma once

#include "codec/vector_codec.cuh"
#include "quantattn/quantize.h"

namespace quantattn::cuda {

inline constexpr int kAppendWarps = 4;

// One warp for each new vector of K (blockIdx.y 0) or V (1): both in one launch. A slot outside the cache is skipped.
template <class KFormat, class VFormat>
__global__ void __launch_bounds__(32 * kAppendWarps) append_kernel(const __grid_constant__ AppendParams p) {
  const KvCacheView& cache = p.cache;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kAppendWarps + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (index >= p.num_tokens * cache.num_kv_heads) return;
  const int64_t token = index / cache.num_kv_heads, head = index % cache.num_kv_heads;
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0 || slot >= cache.num_pages * cache.page_size) return;
  const int64_t page = slot / cache.page_size, in_page = slot % cache.page_size;
  if (blockIdx.y == 0)
    encode_vector<KFormat>(p.k.data, p.k.offset(0, token, head), p.dtype, cache.k_codes, cache.k_scale, page, in_page, head,
                           cache.head_dim, lane);
  else
    encode_vector<VFormat>(p.v.data, p.v.offset(0, token, head), p.dtype, cache.v_codes, cache.v_scale, page, in_page, head,
                           cache.head_dim, lane);
}

}  // namespace quantattn::cuda
