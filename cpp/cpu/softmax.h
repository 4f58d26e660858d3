#pragma once

#include <limits>

#include "cpu/simd.h"
#include "cpu/stages.h"

// Running softmax of one tile of scores (Milakov & Gimelshein, arXiv:1805.02867).
namespace quantattn::cpu::QATTN_ISA {

inline constexpr float kInfinity = __builtin_inff();

// Tokens from `token` on: x where the row sees them.
QATTN_INLINE F32 keep_visible(F32 x, F32 otherwise, TokenRange visible, int token) {
  if (visible.first <= token && visible.end >= token + kLanes) return x;
  const F32 lanes = to_float(lane_numbers());
  x = lanes < static_cast<float>(visible.end - token) ? x : otherwise;
  return lanes < static_cast<float>(visible.first - token) ? otherwise : x;
}

// Offset, soft cap and ALiBi; tokens that the row does not see become -inf. Returns the tile's maximum.
QATTN_INLINE float finish_scores(const SoftmaxJob& job, int row, TokenRange visible, float* scores) {
  const F32 lanes = to_float(lane_numbers());
  F32 tile_max = broadcast(-kInfinity);
  for (int token = 0; token < job.num_tokens; token += kLanes) {
    F32 s = load(scores + token);
    if (job.offsets) s += job.offsets[row];
    if (job.soft_cap > 0.f) s = job.soft_cap * tanh_of(s / job.soft_cap);
    if (job.slopes) s += job.slopes[row] * (job.distances[row] + static_cast<float>(token) + lanes);
    s = keep_visible(s, broadcast(-kInfinity), visible, token);
    store(scores + token, s);
    tile_max = max(s, tile_max);
  }
  return max_of_lanes(tile_max);
}

// Scores that are final as they are: nothing but the maximum.
QATTN_INLINE float max_of_tile(const float* scores) {
  F32 tile_max = broadcast(-kInfinity);
#pragma GCC unroll 16
  for (int token = 0; token < kTileTokens; token += kLanes) tile_max = max(load(scores + token), tile_max);
  return max_of_lanes(tile_max);
}

inline void softmax_rows(const SoftmaxJob& job) {
  const bool is_plain = !(job.soft_cap > 0.f) && !job.slopes && !job.visible && job.num_tokens == kTileTokens;
  for (int row = 0; row < job.num_rows; ++row) {
    float* scores = job.scores + row * kTileTokens;
    const TokenRange visible = job.visible ? job.visible[row] : TokenRange{0, job.num_tokens};
    const float tile_max = is_plain ? max_of_tile(scores) : finish_scores(job, row, visible, scores);
    const float old_max = job.max[row];
    const float new_max = tile_max > old_max ? tile_max : old_max;
    // All scores -inf so far: (-inf) - (-inf) would be NaN.
    const float base = new_max == -kInfinity ? 0.f : new_max;
    F32 sum = {};
    int token = 0;
    for (; token < job.num_tokens; token += kLanes) {
      const F32 weight = exp_nonpositive(load(scores + token) - base);
      sum += weight;
      store(scores + token, keep_visible(weight * load(job.value_scales + token), F32{}, visible, token));
    }
    for (; token < kTileTokens; token += kLanes) store(scores + token, F32{});
    job.rescale[row] = old_max == new_max ? 1.f : exp_nonpositive(broadcast(old_max - base))[0];
    job.sum[row] = job.sum[row] * job.rescale[row] + sum_of_lanes(sum);
    job.max[row] = new_max;
  }
}

}  // namespace quantattn::cpu::QATTN_ISA
