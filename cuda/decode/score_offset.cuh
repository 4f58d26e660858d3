#pragma once

#include "decode/rows.cuh"

// What a key offset adds to every score of a row: sm_scale * q . k_offset. A constant leaves the softmax alone, so that
// without a soft cap it joins the row's maximum, once for each piece of it; with one it joins each score before the cap.
namespace quantattn::cuda {

// Whether anything depends on the constant.
__device__ __forceinline__ bool has_score_offsets(const DecodeParams& p) {
  return p.cache.k_offset && (p.logits_soft_cap > 0.f || p.sinks || p.lse != nullptr);
}

// The constant of row `lane` of an item, in natural units with a soft cap, else multiplied by log2(e). `query` holds the rows
// as they were read, where they were copied.
template <int kHeadDim, int kRows, class Query>
__device__ __forceinline__ float score_offset(const DecodeTask& task, const Item& item, const QueryRange& queries,
                                              const Query& query, int lane) {
  const DecodeParams& p = task.params;
  if (!has_score_offsets(p)) return 0.f;
  constexpr int kCount = kHeadDim / 32, kAtOnce = kRows < 4 ? kRows : 4;  // rows whose reads are under way together
  float offset[kCount], own = 0.f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int d = lane + 32 * i;
    offset[i] = d < p.cache.head_dim ? p.cache.k_offset.at(item.kv_head, d) : 0.f;
  }
#pragma unroll 1
  for (int first = 0; first < kRows && Row(task, item, queries, first, kRows).is_real; first += kAtOnce) {
    float sum[kAtOnce] = {};
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const Row row(task, item, queries, first + r, kRows);
      const int64_t index = p.q.offset(item.sequence, row.token, row.head);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int d = lane + 32 * i;
        const bool is_live = row.is_real && d < p.cache.head_dim;
        RawElement x;
        if (!task.can_copy_query)
          x.read(p.q.data, index + d, p.q_dtype, is_live);
        else if (is_live)
          x.narrow = *query.at(first + r, d);
        sum[r] += x.value(p.q_dtype) * offset[i];
      }
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      for (int distance = 16; distance > 0; distance /= 2) sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], distance);
      if (lane == first + r) own = sum[r];
    }
  }
  return own * p.sm_scale * (p.logits_soft_cap > 0.f ? 1.f : kLog2e);
}

// The maximum of a row's scores as it is passed on, and compared with its other pieces. One that has seen no key keeps none.
__device__ __forceinline__ float with_offset(const DecodeParams& p, const RowConstants& row, float maximum) {
  return p.logits_soft_cap > 0.f || maximum == kNoMaximum ? maximum : maximum + row.offset;
}

}  // namespace quantattn::cuda
