#pragma once

#include "decode/rows.cuh"
#include "decode/score_offset.cuh"
#include "decode/tile_pipeline.cuh"
#include "decode/value_guard.cuh"

// One warp's arithmetic over tiles of 16 keys, on CUDA cores and in float32 throughout: the path of float32 queries.
//
// Scores: lane l takes key l % 16 and every second 16-byte chunk of its channels. Output: each lane owns kOwned neighbouring
// channels and meets the keys one after the other.
namespace quantattn::cuda {

template <class Task, class KFormat, class VFormat, int kPaddedHeadDim, int kRowsPerTile>
class CudaCoreEngine {
  using WidenK = Widen<KFormat>;
  using WidenV = Widen<VFormat>;
  static constexpr int kOwned = kPaddedHeadDim / 32;

 public:
  static constexpr int kHeadDim = kPaddedHeadDim, kRows = kRowsPerTile;
  using Query = QueryRows<kRows, kHeadDim>;
  static constexpr int kQueryBytes = kRows * kHeadDim * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kQueryBytes + (kRows + 7) / 8 * 8 * static_cast<int>(sizeof(RowConstants));

  __device__ __forceinline__ CudaCoreEngine(const Task& task, char* memory, int lane)
      : task_(task),
        query_(reinterpret_cast<float*>(memory)),
        rows_(reinterpret_cast<RowConstants*>(memory + kQueryBytes)),
        lane_(lane) {}

  __device__ __forceinline__ void begin(const Item& item, const SequenceSpan& span, const Query& query) {
    const QueryRange queries = queries_of(task_, item.sequence);
    const float offset = score_offset<kHeadDim, kRows>(task_, item, queries, query, lane_);
    load_query(item, queries, query);
    spoiled_rows_ = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      reference_[r] = kNoMaximum;
      sum_[r] = 0.f;
#pragma unroll
      for (int i = 0; i < kOwned; ++i) output_[r][i] = 0.f;
    }
    if (lane_ < kRows)
      rows_[lane_] = row_constants(task_, *query.inputs(lane_), span, queries, Row(task_, item, queries, lane_, kRows),
                                   WidenK::kFactor, offset);
    __syncwarp();
  }

  __device__ __forceinline__ const RowConstants* rows() const { return rows_; }

  template <class Stage>
  __device__ __forceinline__ void process(const Stage& stage, const SequenceSpan& span, int first_token) {
    const bool masked = needs_mask(span, first_token);
    if (masked && may_rows_differ(task_)) remove_non_finite_values(stage, first_token);
    float scores[kRows] = {};
    multiply_keys(stage.k, scores);
    const DecodeParams& p = task_.params;
    const bool has_transform = masked || p.alibi_slopes || p.logits_soft_cap > 0.f;
    bool exceeds = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      scores[r] += __shfl_xor_sync(0xFFFFFFFFu, scores[r], 16);
      scores[r] *= rows_[r].factor;
      if constexpr (KFormat::kHasScale) scores[r] *= stage.k_scale[lane_ % 16];
      if (has_transform) scores[r] = transform_score(p, rows_[r], scores[r], first_token + lane_ % 16, masked);
      exceeds |= scores[r] > reference_[r] + kMaximumSlack;
    }
    if (__any_sync(0xFFFFFFFFu, exceeds)) raise_references(scores);
    float weights[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      weights[r] = exp2_approx(scores[r] - reference_[r]);
      sum_[r] += weights[r];
      if constexpr (VFormat::kHasScale) weights[r] *= stage.v_scale[lane_ % 16];
    }
    multiply_values(stage.v, weights);
  }

  // Stores the sums of all rows, and the values of the first `num_rows`.
  template <class ItemPiece>
  __device__ __forceinline__ void store(const ItemPiece& piece, int num_rows) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = sum_[r];  // lanes l and l + 16 hold the same keys
      for (int distance = 1; distance < 16; distance *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
      piece.maximum(r) = with_offset(task_.params, rows_[r], reference_[r]);
      piece.sum(r) = sum;
      if (r >= num_rows) continue;
      const float unit = spoiled_rows_ >> r & 1u ? NAN : rows_[r].v_scale * WidenV::kFactor;
#pragma unroll
      for (int i = 0; i < kOwned; ++i) piece.values(r, lane_ * kOwned)[i] = output_[r][i] * unit;
    }
  }

 private:
  __device__ __forceinline__ void load_query(const Item& item, const QueryRange& queries, const Query& query) {
    const DecodeParams& p = task_.params;
    RawElement x[kRows][kOwned];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Row row(task_, item, queries, r, kRows);
      const int64_t offset = p.q.offset(item.sequence, row.token, row.head);
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        const int d = lane_ + 32 * i;
        if (task_.can_copy_query)
          x[r][i].narrow = *query.at(r, d);
        else
          x[r][i].read(p.q.data, offset + d, p.q_dtype, row.is_real && d < p.cache.head_dim);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kOwned; ++i) query_[r * kHeadDim + lane_ + 32 * i] = x[r][i].value(p.q_dtype);
  }

  __device__ __forceinline__ void multiply_keys(const char* k, float (&scores)[kRows]) {
    using Layout = TileLayout<kHeadDim * WidenK::kBytes>;
    constexpr int kPerChunk = 16 / WidenK::kBytes, kChunks = kHeadDim / kPerChunk;
#pragma unroll
    for (int i = 0; i < kChunks / 2; ++i) {
      const int chunk = 2 * i + lane_ / 16;
      const uint4 codes = *reinterpret_cast<const uint4*>(k + Layout::chunk_offset(lane_ % 16, chunk));
      const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
      float values[kPerChunk];
      widen_to_float<KFormat>(words, values);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float* q = query_ + r * kHeadDim + chunk * kPerChunk;
#pragma unroll
        for (int j = 0; j < kPerChunk; j += 4) {
          const float4 four = *reinterpret_cast<const float4*>(q + j);
          scores[r] += four.x * values[j] + four.y * values[j + 1] + four.z * values[j + 2] + four.w * values[j + 3];
        }
      }
    }
  }

  __device__ __forceinline__ void raise_references(const float (&scores)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float raised = fmaxf(reference_[r], scores[r]);
      for (int distance = 1; distance < 16; distance *= 2)
        raised = fmaxf(raised, __shfl_xor_sync(0xFFFFFFFFu, raised, distance));
      // A row's result does not depend on the other rows of its tile.
      if (raised <= reference_[r] + kMaximumSlack) raised = reference_[r];
      const float rescale = exp2_approx(reference_[r] - raised);
      reference_[r] = raised;
      sum_[r] *= rescale;
#pragma unroll
      for (int i = 0; i < kOwned; ++i) output_[r][i] *= rescale;
    }
  }

  template <class Stage>
  __device__ __forceinline__ void remove_non_finite_values(const Stage& stage, int first_token) {
    using Guard = ValueGuard<VFormat, kHeadDim>;
    unsigned keys = Guard::find(stage, lane_);
    if (keys == 0) return;
#pragma unroll 1
    for (; keys != 0; keys &= keys - 1)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        spoiled_rows_ |= rows_[r].sees(first_token + __ffs(static_cast<int>(keys)) - 1) ? 1u << r : 0u;
    Guard::clear(stage, lane_);
    __syncwarp();
  }

  __device__ __forceinline__ void multiply_values(const char* v, const float (&weights)[kRows]) {
    using Layout = TileLayout<kHeadDim * WidenV::kBytes>;
    constexpr int kBytes = kOwned * WidenV::kBytes, kWords = (kBytes + 3) / 4;
#pragma unroll 4  // all sixteen at once spill where K and V differ in width
    for (int key = 0; key < kTileTokens; ++key) {
      uint32_t words[kWords];
      const char* from = v + Layout::byte_offset(key, lane_ * kBytes);
      if constexpr (kBytes == 2)
        words[0] = *reinterpret_cast<const uint16_t*>(from);
      else
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = *reinterpret_cast<const uint32_t*>(from + 4 * i);
      float values[kOwned];
      widen_to_float<VFormat>(words, values);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float weight = __shfl_sync(0xFFFFFFFFu, weights[r], key);
#pragma unroll
        for (int i = 0; i < kOwned; ++i) output_[r][i] += weight * values[i];
      }
    }
  }

  const Task& task_;
  float* query_;        // [kRows, kHeadDim]
  RowConstants* rows_;  // [kRows]
  int lane_;
  unsigned spoiled_rows_ = 0;  // bit r: row r has seen a value that is not finite
  float output_[kRows][kOwned];
  float reference_[kRows], sum_[kRows];
};

}  // namespace quantattn::cuda
