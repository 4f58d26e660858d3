#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "decode/ptx.cuh"
#include "decode/sequences.cuh"

// What both kernel families do with single rows: read the query, mask and transform scores, write the result.
namespace quantattn::cuda {

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The running maximum of a row that has seen no key: finite, so that (-inf) - maximum stays -inf, and below every score.
inline constexpr float kNoMaximum = -1e38f;

// Scores are kept multiplied by log2(e). A row's reference is raised only when a score exceeds it by this much: every
// weight stays below 2^kMaximumSlack, and most tiles need no reduction over the warp.
inline constexpr float kMaximumSlack = 8.f;

// An element of a query as it was read. Reading and converting are apart, so that many reads can be under way before the
// first is needed, and one piece of code serves every dtype.
struct RawElement {
  float wide = 0.f;
  uint16_t narrow = 0;

  __device__ __forceinline__ void read(const void* data, int64_t index, DType dtype, bool is_live) {
    if (is_live && dtype == DType::kFloat32) wide = static_cast<const float*>(data)[index];
    if (is_live && dtype != DType::kFloat32) narrow = static_cast<const uint16_t*>(data)[index];
  }
  __device__ __forceinline__ float value(DType dtype) const {
    const float half = __half2float(__ushort_as_half(narrow)), bfloat = __uint_as_float(static_cast<unsigned>(narrow) << 16);
    return dtype == DType::kFloat32 ? wide : dtype == DType::kFloat16 ? half : bfloat;
  }
};

// Where a row of an item stands in the query and the output.
struct Row {
  bool is_real;  // row tiles are padded to the kernel's height
  int index;     // of the query token in its sequence
  int token, head;

  __device__ __forceinline__ Row(const auto& task, const Item& item, const QueryRange& queries, int row_in_tile,
                                 int rows_per_tile) {
    const int row = item.row_tile * rows_per_tile + row_in_tile;
    is_real = row < queries.num_rows;
    const int group_size = static_cast<int>(task.group_size.divisor);
    index = is_real ? static_cast<int>(task.group_size.quotient(static_cast<unsigned>(row))) : 0;
    token = queries.first_token + index;
    head = item.kv_head * group_size + (is_real ? row - index * group_size : 0);
  }
};

// The static scale of a head; null where scales belong to tokens, or to nothing.
__device__ __forceinline__ const float* static_scale_address(const ScaleView& scale, int head) {
  const bool is_static = scale.granularity == ScaleGranularity::kTensor || scale.granularity == ScaleGranularity::kHead;
  return is_static ? static_cast<const float*>(scale.data) + scale.offset(0, 0, head) : nullptr;
}

// 1 where there is no static scale.
__device__ __forceinline__ float static_scale(const ScaleView& scale, int head) {
  const float* const address = static_scale_address(scale, head);
  return address == nullptr ? 1.f : *address;
}

// What belongs to a row beside its query, in shared memory: it comes with the query and takes no register until it is used.
struct RowInputs {
  float k_scale, v_scale;  // static ones, else 1
  float slope;
  int first_key;

  __device__ __forceinline__ void copy(const auto& task, const Item& item, const Row& row) {
    const DecodeParams& p = task.params;
    copy_or_store(k_scale, static_scale_address(p.cache.k_scale, item.kv_head), 1.f);
    copy_or_store(v_scale, static_scale_address(p.cache.v_scale, item.kv_head), 1.f);
    copy_or_store(slope, p.alibi_slopes && row.is_real ? &p.alibi_slopes.at(item.sequence, row.head) : nullptr, 0.f);
    copy_or_store(first_key, p.seq_starts ? &p.seq_starts[item.sequence] : nullptr, 0);
  }

 private:
  template <class T>
  __device__ __forceinline__ static void copy_or_store(T& to, const T* from, T otherwise) {
    if (from != nullptr)
      copy_async<4>(shared_address(&to), from, true);
    else
      to = otherwise;
  }
};

// The constants of a row's scores and of its end, in shared memory.
struct RowConstants {
  float factor;             // multiplies the dot product; log2(e) included unless there is a soft cap
  float slope;              // ALiBi, multiplied by log2(e)
  int position;             // of the query token
  int first_key, last_key;  // the row sees keys [first_key, last_key]
  float v_scale;
  float offset;  // see score_offset.cuh

  __device__ __forceinline__ bool sees(int key) const { return key >= first_key && key <= last_key; }
};

__device__ __forceinline__ RowConstants row_constants(const auto& task, const RowInputs& inputs, const SequenceSpan& span,
                                                      const QueryRange& queries, const Row& row, float unit, float offset) {
  const DecodeParams& p = task.params;
  RowConstants constants;
  constants.factor = unit * inputs.k_scale * p.sm_scale * (p.logits_soft_cap > 0.f ? 1.f : kLog2e);
  constants.slope = inputs.slope * kLog2e;
  constants.position = span.first_position(task, queries) + row.index;
  const int window_start = p.sliding_window > 0 ? constants.position + 1 - p.sliding_window : 0;
  constants.first_key = max(inputs.first_key, window_start);
  constants.last_key = task.is_causal() ? constants.position : span.whole_end - 1;
  constants.v_scale = inputs.v_scale;
  constants.offset = offset;
  return constants;
}

// True where some row may not see every key of the tile.
__device__ __forceinline__ bool needs_mask(const SequenceSpan& span, int first_token) {
  return first_token < span.whole_begin || first_token + kTileTokens > span.whole_end;
}

// True where rows of one tile may see different keys.
__device__ __forceinline__ bool may_rows_differ(const auto& task) { return task.params.num_q_tokens != 1; }

// The rare parts of a score: soft cap, ALiBi, masks. `score` is the scaled dot product.
__device__ __forceinline__ float transform_score(const DecodeParams& p, const RowConstants& row, float score, int key,
                                                 bool masked) {
  if (p.logits_soft_cap > 0.f) score = p.logits_soft_cap * tanhf((score + row.offset) / p.logits_soft_cap) * kLog2e;
  if (p.alibi_slopes) score += row.slope * static_cast<float>(key - row.position);
  if (masked && !row.sees(key)) score = -INFINITY;
  return score;
}

// The end of a row: its sums, normalised. The sink joins the denominator here, once.
struct RowResult {
  float multiplier;  // of the accumulators
  float maximum, sum;
  float lone_sink;  // where the row sees no key

  __device__ __forceinline__ float lse() const {
    if (sum == 0.f) return -INFINITY;
    return maximum > kNoMaximum || isnan(sum) ? maximum * kLn2 + logf(sum) : lone_sink;  // a NaN score shows
  }
};

__device__ __forceinline__ RowResult finish_row(const DecodeParams& p, const Row& row, float maximum, float sum) {
  if (!p.sinks) return {sum == 0.f ? 0.f : __fdividef(1.f, sum), maximum, sum, 0.f};
  const float sink = p.sinks[row.head], sink_log2 = sink * kLog2e, raised = fmaxf(maximum, sink_log2);
  const float rescale = exp2_approx(maximum - raised);
  const float total = sum * rescale + exp2_approx(sink_log2 - raised);
  return {total == 0.f ? 0.f : rescale / total, maximum > kNoMaximum ? raised : kNoMaximum, total,
          sink};  // alone, the sink is the sum, exactly
}

__device__ __forceinline__ int64_t lse_index(const DecodeParams& p, int sequence, const Row& row) {
  return (static_cast<int64_t>(sequence) * p.num_q_tokens + row.token) * p.num_q_heads + row.head;
}

}  // namespace quantattn::cuda
