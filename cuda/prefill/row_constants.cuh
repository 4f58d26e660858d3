#pragma once

#include <cfloat>

#include "decode/rows.cuh"
#include "prefill/row_tile.cuh"

// What belongs to one row of a row tile: how its scores are scaled and masked, and how it ends.
namespace quantattn::cuda {

struct PrefillRow {
  float factor;   // multiplies the dot product; positive; log2(e) included unless there is a soft cap
  float slope;    // ALiBi, multiplied by log2(e)
  int position;   // of the query token
  int first_key;  // the row sees keys [first_key, last_key]
  int last_key;
  float offset;    // what the key offset adds to every score, before a soft cap; else multiplied by log2(e)
  bool is_spoilt;  // sees a value that is not finite and was taken out of its tile
};

// The product of static scales with sm_scale may be negative; the sign goes to the query, so that the factor never is.
__device__ __forceinline__ float score_scale(const PrefillTask& task, int kv_head) {
  return task.sm_scale * static_scale(task.k_scale, kv_head);
}

// Head of the query that a row of the sequence stands for.
__device__ __forceinline__ int head_of_row(const PrefillTask& task, int kv_head, int row, int token) {
  const int group_size = static_cast<int>(task.group_size.divisor);
  return kv_head * group_size + row - token * group_size;
}

// Whether anything depends on what a key offset adds to all scores of a row: a constant leaves the softmax alone.
__device__ __forceinline__ bool has_score_offsets(const PrefillTask& task) {
  return task.k_offset && (task.logits_soft_cap > 0.f || task.sinks || task.lse != nullptr);
}

// What the product of a row's operands with a key's is multiplied by; `unit`: a power of two that has to be part of it.
__device__ __forceinline__ float score_factor(const PrefillTask& task, const RowTile& tile, float unit) {
  const float factor = unit * fabsf(score_scale(task, tile.kv_head)) * (task.logits_soft_cap > 0.f ? 1.f : kLog2e);
  return fmaxf(factor, FLT_MIN);  // so that a masked score stays -inf
}

__device__ __forceinline__ PrefillRow prefill_row(const PrefillTask& task, const RowTile& tile, int row_in_tile, float unit,
                                                  float offset) {
  const int row = tile.first_row + min(row_in_tile, tile.num_rows - 1), token = token_of_row(task, row);
  PrefillRow result;
  result.factor = score_factor(task, tile, unit);
  result.slope =
      task.alibi_slopes ? task.alibi_slopes.at(tile.sequence, head_of_row(task, tile.kv_head, row, token)) * kLog2e : 0.f;
  result.position = tile.first_position() + token;
  result.first_key = tile.start;
  if (task.sliding_window > 0) result.first_key = max(result.first_key, result.position + 1 - task.sliding_window);
  result.last_key = task.causal ? min(result.position, tile.length - 1) : tile.length - 1;
  result.offset = offset;
  result.is_spoilt = false;
  return result;
}

// Whether some row does not see all keys of a tile: the first row sees the fewest at its end, the last row at its beginning.
__device__ __forceinline__ bool hides_last_keys(const PrefillRow& first_row, int first_key, int num_keys) {
  return first_key + num_keys - 1 > first_row.last_key;
}
__device__ __forceinline__ bool hides_first_keys(const PrefillRow& last_row, int first_key) {
  return first_key < last_row.first_key;
}

// A score under a soft cap, in base 2: outer * tanh(score / cap), with inner = 2 * log2(e) / cap and outer = cap * log2(e), by
// tanh(x) = 1 - 2 / (1 + exp(2 x)). The tangent has an absolute error of 2^-22.
__device__ __forceinline__ float cap_score(float score, float inner, float outer) {
  return outer - __fdividef(2.f * outer, 1.f + exp2_approx(score * inner));
}

// The end of a row. The sink joins the denominator here, once.
struct PrefillRowEnd {
  float multiplier, lse;
};

__device__ __forceinline__ PrefillRowEnd finish_prefill_row(const PrefillTask& task, const PrefillRow& row, int head,
                                                            float maximum, float sum) {
  const bool sees_key = maximum > kNoMaximum || isnan(sum);
  if (!sees_key) return {0.f, task.sinks ? task.sinks[head] : -INFINITY};
  if (task.logits_soft_cap == 0.f) maximum += row.offset;
  if (!task.sinks) return {__fdividef(1.f, sum), maximum * kLn2 + logf(sum)};
  const float sink = task.sinks[head] * kLog2e, raised = fmaxf(maximum, sink), rescale = exp2_approx(maximum - raised);
  const float total = sum * rescale + exp2_approx(sink - raised);
  return {rescale / total, raised * kLn2 + logf(total)};
}

}  // namespace quantattn::cuda
