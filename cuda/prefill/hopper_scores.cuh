#pragma once

#include "prefill/hopper_product.cuh"
#include "prefill/row_constants.cuh"

// What happens to some scores only between the product that computes them and the softmax: soft cap, ALiBi, masks. Each is a
// pass of its own over a thread's scores of one of its two rows, `h`; own_key is the key of the first one. See
// hopper_product.cuh for who holds which.
namespace quantattn::cuda {

// Calls transform(score, key), keys counted from own_key.
template <int kScores, class Transform>
__device__ __forceinline__ void for_each_score(float (&scores)[kScores], int h, const Transform& transform) {
#pragma unroll
  for (int n = 0; n < kScores / 4; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) scores[4 * n + 2 * h + j] = transform(scores[4 * n + 2 * h + j], 8 * n + j);
}

// Scores of keys that the row does not see become -inf. Most tiles hide last keys only, or first ones.
template <int kScores>
__device__ __forceinline__ void mask_scores(const PrefillRow& row, int own_key, int h, float (&scores)[kScores]) {
  constexpr int kKeys = 2 * kScores;
  const int first = row.first_key - own_key, last = row.last_key - own_key;
  if (__any_sync(0xFFFFFFFFu, last < kKeys - 1))
    for_each_score(scores, h, [&](float score, int key) { return key > last ? -INFINITY : score; });
  if (__any_sync(0xFFFFFFFFu, first > 0))
    for_each_score(scores, h, [&](float score, int key) { return key < first ? -INFINITY : score; });
}

// Soft cap and ALiBi. On return scores need no factor.
template <int kScores>
__device__ __forceinline__ void transform_scores(const PrefillTask& task, const PrefillRow& row, float factor, int own_key,
                                                 int h, float (&scores)[kScores]) {
  if (task.logits_soft_cap > 0.f) {
    const float inner = 2.f * kLog2e * factor / task.logits_soft_cap, outer = task.logits_soft_cap * kLog2e;
    for_each_score(scores, h, [&](float score, int) { return cap_score(score, inner, outer); });
  } else {
    for_each_score(scores, h, [&](float score, int) { return score * factor; });
  }
  if (task.alibi_slopes) {
    const float slope = row.slope, distance = static_cast<float>(own_key - row.position);
    for_each_score(scores, h, [&](float score, int key) { return fmaf(slope, distance + static_cast<float>(key), score); });
  }
}

}  // namespace quantattn::cuda
