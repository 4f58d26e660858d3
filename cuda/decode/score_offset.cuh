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
__device__ __forceinline__ float score_offset(const auto& task, const Item& item, const QueryRange& queries, const Query& query,
                                              int lane) {
  const DecodeParams& p = task.params;
  if (!has_score_offsets(p)) return 0.f;
  constexpr int kCount = kHeadDim / 32;
  float offset[kCount], own = 0.f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int d = lane + 32 * i;
    offset[i] = d < p.cache.head_dim ? p.cache.k_offset.at(item.kv_head, d) : 0.f;
  }
  const int num_rows = min(kRows, queries.num_rows - item.row_tile * kRows);
  // High tiles take one row at a time: few instructions, since most calls have no offset and fetch what lies around these.
#pragma unroll(kRows <= 4 ? kRows : 1)
  for (int r = 0; r < num_rows; ++r) {
    const Row row(task, item, queries, r, kRows);
    const int64_t index = p.q.offset(item.sequence, row.token, row.head);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int d = lane + 32 * i;
      RawElement x;
      if (!task.can_copy_query)
        x.read(p.q.data, index + d, p.q_dtype, d < p.cache.head_dim);
      else if (d < p.cache.head_dim)
        x.narrow = *query.at(r, d);
      sum += x.value(p.q_dtype) * offset[i];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
    if (lane == r) own = sum;
  }
  return own * p.sm_scale * (p.logits_soft_cap > 0.f ? 1.f : kLog2e);
}

// The maximum of a row's scores as it is passed on, and compared with its other pieces. One that has seen no key keeps none.
__device__ __forceinline__ float with_offset(const DecodeParams& p, const RowConstants& row, float maximum) {
  return p.logits_soft_cap > 0.f || maximum == kNoMaximum ? maximum : maximum + row.offset;
}

}  // namespace quantattn::cuda
