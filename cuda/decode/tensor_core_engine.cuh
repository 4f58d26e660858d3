#pragma once

#include "decode/rows.cuh"
#include "decode/score_offset.cuh"
#include "decode/tile_pipeline.cuh"
#include "decode/value_guard.cuh"

// One warp's arithmetic over tiles of 16 keys, on tensor cores (m16n8k16).
//
// Scores: K is the M operand (16 keys), the rows of the query are N (8 for each of kColumns column tiles), so a small group
// wastes no more than the padding to 8. Output: V transposed is the M operand (16 channels), the weights are N.
//
// An 8-bit K tile is loaded as if two codes were one 16-bit element: a thread then holds codes 4t .. 4t + 3 of each 16 where
// the instruction expects channels 2t, 2t + 1, 2t + 8, 2t + 9. A dot product does not care about the order of its terms, so the
// query is read in that order and no code moves. An 8-bit V tile comes transposed in pairs of channels; rows g and g + 8
// of the instruction stand for channels 2g and 2g + 1.
namespace quantattn::cuda {

template <class Task, class KFormat, class VFormat, int kPaddedHeadDim, int kColumnTiles>
class TensorCoreEngine {
  using WidenK = Widen<KFormat>;
  using WidenV = Widen<VFormat>;

 public:
  static constexpr int kHeadDim = kPaddedHeadDim, kColumns = kColumnTiles, kRows = 8 * kColumns;
  using Query = QueryRows<kRows, kHeadDim>;
  // bfloat16 operands keep 8 bits; the query and the weights are split into a high and a low part to keep 16.
  static constexpr int kLowBytes = WidenK::kIsBf16 ? Query::kBytes : 0;
  static constexpr int kSharedBytes = kLowBytes + kRows * static_cast<int>(sizeof(RowConstants));

  __device__ __forceinline__ TensorCoreEngine(const Task& task, char* memory, int lane)
      : task_(task),
        query_low_(reinterpret_cast<uint16_t*>(memory)),
        rows_(reinterpret_cast<RowConstants*>(memory + kLowBytes)),
        lane_(lane) {}

  __device__ __forceinline__ const RowConstants* rows() const { return rows_; }

  __device__ __forceinline__ void begin(const Item& item, const SequenceSpan& span, const Query& query) {
    query_ = query.data;
    const QueryRange queries = queries_of(task_, item.sequence);
    const float offset = score_offset<kHeadDim, kRows>(task_, item, queries, query, lane_);
    constexpr DType kOperand = WidenK::kIsBf16 ? DType::kBFloat16 : DType::kFloat16;
    float own_unit = 1.f;
    is_exact_ = task_.can_copy_query && task_.params.q_dtype == kOperand;
    if (!is_exact_) convert_query(item, queries, own_unit);
    if (lane_ < kRows)
      rows_[lane_] = row_constants(task_, *query.inputs(lane_), span, queries, Row(task_, item, queries, lane_, kRows),
                                   own_unit * WidenK::kFactor, offset);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) base_[n][i] = kNoMaximum, sum_[n][i] = 0.f;
#pragma unroll
      for (int m = 0; m < kHeadDim / 16; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) output_[n][m][i] = 0.f;
    }
    v_unit_bits_ = spoiled_rows_ = 0;
    __syncwarp();
  }

  template <class Stage>
  __device__ __forceinline__ void process(const Stage& stage, const SequenceSpan& span, int first_token) {
    const bool masked = needs_mask(span, first_token);
    if (masked && may_rows_differ(task_)) remove_non_finite_values(stage, first_token);
    float scores[kColumns][4] = {};
    multiply_keys(stage.k, scores);
    float factors[kColumns][2];
    scale_scores(stage, first_token, masked, scores, factors);
    float exponents[kColumns][4];
    if (__any_sync(0xFFFFFFFFu, compute_exponents(scores, factors, exponents))) {
      raise_bases(scores, factors, exponents);
      compute_exponents(scores, factors, exponents);
    }
    float v_scale[2] = {1.f, 1.f};
    if constexpr (VFormat::kHasScale) load_value_scales(stage.v_scale, v_scale);
    uint2 weights[kColumns], weights_low[kColumns];
    compute_weights(exponents, v_scale, weights, weights_low);
    multiply_values(stage.v, weights, weights_low);
  }

  // Stores the sums of all rows, and the values of the first `num_rows`.
  template <class ItemPiece>
  __device__ __forceinline__ void store(const ItemPiece& piece, int num_rows) {
    const float common_unit = (v_unit_bits_ == 0 ? 1.f : __uint_as_float(v_unit_bits_)) * WidenV::kFactor * kWeightInverse;
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 8 * n + 2 * (lane_ % 4) + i;
        float sum = sum_[n][i];
        for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
        const float maximum = base_[n][i] == kNoMaximum ? kNoMaximum : base_[n][i] + kWeightExponent;
        piece.maximum(row) = with_offset(task_.params, rows_[row], maximum);
        piece.sum(row) = sum * kWeightInverse;
        if (row >= num_rows) continue;
        const float unit = spoiled_rows_ >> (2 * n + i) & 1u ? NAN : common_unit * rows_[row].v_scale;
        float* const to = piece.values(row, WidenV::kBytes == 1 ? 2 * (lane_ / 4) : lane_ / 4);
#pragma unroll
        for (int m = 0; m < kHeadDim / 16; ++m) {
          const float first = output_[n][m][i] * unit, second = output_[n][m][i + 2] * unit;
          if constexpr (WidenV::kBytes == 1) {
            *reinterpret_cast<float2*>(to + 16 * m) = make_float2(first, second);
          } else {
            to[16 * m] = first;
            to[16 * m + 8] = second;
          }
        }
      }
  }

 private:
  // Weights are float16 with 2^6 in front: a score at its row's reference gives 64, one at the slack's end 16384 (times a
  // scale below 2), and those below 2^-20 only become subnormal.
  static constexpr float kWeightExponent = 6.f, kWeightInverse = 1.f / 64.f, kMostExponent = kMaximumSlack + kWeightExponent;

  // Rewrites the rows, which are of another dtype or not yet here, as operands, each divided by a power of two so that
  // neither large nor tiny queries leave their range; lane r gets the power of row r.
  __device__ __forceinline__ void convert_query(const Item& item, const QueryRange& queries, float& own_unit) {
    const DecodeParams& p = task_.params;
    constexpr int kCount = kHeadDim / 32, kAtOnce = kHeadDim > 128 ? 2 : 4;  // rows whose reads are under way together
#pragma unroll 1
    for (int first = 0; first < kRows; first += kAtOnce) {
      RawElement x[kAtOnce][kCount];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const Row row(task_, item, queries, first + r, kRows);
        const int64_t offset = p.q.offset(item.sequence, row.token, row.head);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int d = channel_of(i);
          if (task_.can_copy_query)
            x[r][i].narrow = query_[(first + r) * Query::kPitch + d];
          else
            x[r][i].read(p.q.data, offset + d, p.q_dtype, row.is_real && d < p.cache.head_dim);
        }
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const float unit = store_query_row(x[r], first + r);
        if (lane_ == first + r) own_unit = unit;
      }
    }
  }

  // The i-th channel of a row that this lane converts.
  __device__ __forceinline__ int channel_of(int i) const { return i / 2 * 64 + 2 * lane_ + i % 2; }

  template <int kCount>
  __device__ __forceinline__ float store_query_row(const RawElement (&raw)[kCount], int r) {
    float x[kCount];
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = raw[i].value(task_.params.q_dtype);
      largest = fmaxf(largest, fabsf(x[i]));
    }
    const unsigned exponent = __reduce_max_sync(0xFFFFFFFFu, __float_as_uint(largest)) >> 23;
    const unsigned bounded = exponent == 255 ? 127 : min(max(exponent, 1u), 253u);
    const float inverse = __uint_as_float((254 - bounded) << 23);
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const int index = r * Query::kPitch + channel_of(i);
      const float low = x[i] * inverse, high = x[i + 1] * inverse;
      if constexpr (WidenK::kIsBf16) {
        const uint32_t packed = pack_bfloat16(low, high);
        *reinterpret_cast<uint32_t*>(query_ + index) = packed;
        *reinterpret_cast<uint32_t*>(query_low_ + index) =
            pack_bfloat16(low - __uint_as_float(packed << 16), high - __uint_as_float(packed & 0xFFFF0000u));
      } else {
        *reinterpret_cast<uint32_t*>(query_ + index) = pack_float16(low, high);
      }
    }
    return __uint_as_float(bounded << 23);
  }

  // A thread's four operands of 16 channels: channels 4t .. 4t + 3 for 8-bit codes, 2t, 2t + 1, 2t + 8, 2t + 9 for others.
  __device__ __forceinline__ uint2 query_operand(const uint16_t* query, int n, int block) const {
    const uint16_t* row = query + (8 * n + lane_ / 4) * Query::kPitch + block * 16;
    if constexpr (WidenK::kBytes == 1) return *reinterpret_cast<const uint2*>(row + lane_ % 4 * 4);
    return {*reinterpret_cast<const uint32_t*>(row + lane_ % 4 * 2),
            *reinterpret_cast<const uint32_t*>(row + lane_ % 4 * 2 + 8)};
  }

  __device__ __forceinline__ void multiply_key_block(const uint32_t (&a)[4], int block, float (&scores)[kColumns][4]) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      if constexpr (WidenK::kIsBf16) {
        multiply_bfloat16(scores[n], a, query_operand(query_, n, block));
        if (!is_exact_) multiply_bfloat16(scores[n], a, query_operand(query_low_, n, block));
      } else {
        multiply_float16(scores[n], a, query_operand(query_, n, block));
      }
    }
  }

  __device__ __forceinline__ void multiply_keys(const char* k, float (&scores)[kColumns][4]) {
    using Layout = TileLayout<kHeadDim * WidenK::kBytes>;
    const uint32_t base = shared_address(k) + static_cast<uint32_t>(Layout::chunk_offset(lane_ % 16, lane_ / 16));
#pragma unroll
    for (int chunk = 0; chunk < kHeadDim * WidenK::kBytes / 16; chunk += 2) {
      uint32_t r[4];
      load_matrices(r, Layout::further(base, 0, chunk));
      if constexpr (WidenK::kBytes == 2) {
        multiply_key_block(r, chunk / 2, scores);
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t a[4];
          WidenK::template widen<ByteOrder::kAdjacent>(r[2 * i], a[0], a[2]);
          WidenK::template widen<ByteOrder::kAdjacent>(r[2 * i + 1], a[1], a[3]);
          multiply_key_block(a, chunk + i, scores);
        }
      }
    }
  }

  // This thread's scores: keys g and g + 8, rows 2t and 2t + 1 of each column tile. On return score * factor is final.
  template <class Stage>
  __device__ __forceinline__ void scale_scores(const Stage& stage, int first_token, bool masked, float (&scores)[kColumns][4],
                                               float (&factors)[kColumns][2]) {
    float k_scale[2] = {1.f, 1.f};
    if constexpr (KFormat::kHasScale) k_scale[0] = stage.k_scale[lane_ / 4], k_scale[1] = stage.k_scale[lane_ / 4 + 8];
    const DecodeParams& p = task_.params;
    const bool is_special = masked || p.alibi_slopes || p.logits_soft_cap > 0.f;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const RowConstants* rows = rows_ + 8 * n + 2 * (lane_ % 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) factors[n][i] = rows[i].factor;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if constexpr (KFormat::kHasScale) scores[n][i] *= k_scale[i / 2];
      if (!is_special) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scores[n][i] =
            transform_score(p, rows[i % 2], scores[n][i] * factors[n][i % 2], first_token + lane_ / 4 + i / 2 * 8, masked);
      factors[n][0] = factors[n][1] = 1.f;
    }
  }

  // Base-2 exponents of the weights; true where one exceeds what a weight may be.
  __device__ __forceinline__ bool compute_exponents(const float (&scores)[kColumns][4], const float (&factors)[kColumns][2],
                                                    float (&exponents)[kColumns][4]) const {
    bool exceeds = false;
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        exponents[n][i] = fmaf(scores[n][i], factors[n][i % 2], -base_[n][i % 2]);
        exceeds |= exponents[n][i] > kMostExponent;
      }
    return exceeds;
  }

  // Raises the bases of the rows that need it: a row's result does not depend on the other rows of its tile.
  __device__ __forceinline__ void raise_bases(const float (&scores)[kColumns][4], const float (&factors)[kColumns][2],
                                              const float (&exponents)[kColumns][4]) {
    const unsigned lanes_of_rows = 0x11111111u << lane_ % 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float raised = fmaxf(scores[n][i] * factors[n][i], scores[n][i + 2] * factors[n][i]) - kWeightExponent;
        for (int distance = 4; distance < 32; distance *= 2)
          raised = fmaxf(raised, __shfl_xor_sync(0xFFFFFFFFu, raised, distance));
        const bool exceeds = exponents[n][i] > kMostExponent || exponents[n][i + 2] > kMostExponent;
        if ((__ballot_sync(0xFFFFFFFFu, exceeds) & lanes_of_rows) == 0) raised = base_[n][i];
        const float rescale = exp2_approx(base_[n][i] - raised);
        base_[n][i] = raised;
        sum_[n][i] *= rescale;
#pragma unroll
        for (int m = 0; m < kHeadDim / 16; ++m) output_[n][m][i] *= rescale, output_[n][m][i + 2] *= rescale;
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
      for (int r = 0; r < 2 * kColumns; ++r) {
        const RowConstants& row = rows_[r / 2 * 8 + 2 * (lane_ % 4) + r % 2];
        spoiled_rows_ |= row.sees(first_token + __ffs(static_cast<int>(keys)) - 1) ? 1u << r : 0u;
      }
    Guard::clear(stage, lane_);
    __syncwarp();
  }

  // Scales of single tokens join the weights, relative to a power of two above the largest so far: whatever the magnitude of
  // V, the product stays in float16's range.
  __device__ __forceinline__ void load_value_scales(const float* scales, float (&v_scale)[2]) {
    v_scale[0] = scales[lane_ / 4], v_scale[1] = scales[lane_ / 4 + 8];
    const unsigned largest = __reduce_max_sync(0xFFFFFFFFu, __float_as_uint(fmaxf(fabsf(v_scale[0]), fabsf(v_scale[1]))));
    const unsigned unit_bits = largest & 0x7F800000u;
    if (unit_bits > v_unit_bits_) {
      const float rescale = __uint_as_float(v_unit_bits_) * __uint_as_float(0x7F000000u - unit_bits);
      v_unit_bits_ = unit_bits;
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int m = 0; m < kHeadDim / 16; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) output_[n][m][i] *= rescale;
    }
    const float inverse = __uint_as_float(0x7F000000u - v_unit_bits_);
    v_scale[0] *= inverse, v_scale[1] *= inverse;
  }

  // The score fragment has keys as rows; transposed, its halves are the N operand of the second product.
  __device__ __forceinline__ void compute_weights(const float (&exponents)[kColumns][4], const float (&v_scale)[2],
                                                  uint2 (&weights)[kColumns], uint2 (&weights_low)[kColumns]) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[i] = exp2_approx(exponents[n][i]);
        sum_[n][i % 2] += w[i];
        if constexpr (VFormat::kHasScale) w[i] *= v_scale[i / 2];
      }
      if constexpr (WidenV::kIsBf16) {
        const uint32_t first = pack_bfloat16(w[0], w[1]), second = pack_bfloat16(w[2], w[3]);
        weights[n] = {transpose_matrix(first), transpose_matrix(second)};
        const uint32_t first_low =
            pack_bfloat16(w[0] - __uint_as_float(first << 16), w[1] - __uint_as_float(first & 0xFFFF0000u));
        const uint32_t second_low =
            pack_bfloat16(w[2] - __uint_as_float(second << 16), w[3] - __uint_as_float(second & 0xFFFF0000u));
        weights_low[n] = {transpose_matrix(first_low), transpose_matrix(second_low)};
      } else {
        weights[n] = {transpose_matrix(pack_float16(w[0], w[1])), transpose_matrix(pack_float16(w[2], w[3]))};
      }
    }
  }

  __device__ __forceinline__ void multiply_value_block(const uint32_t (&a)[4], int m, const uint2 (&weights)[kColumns],
                                                       const uint2 (&weights_low)[kColumns]) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      if constexpr (WidenV::kIsBf16) {
        multiply_bfloat16(output_[n][m], a, weights[n]);
        multiply_bfloat16(output_[n][m], a, weights_low[n]);
      } else {
        multiply_float16(output_[n][m], a, weights[n]);
      }
    }
  }

  __device__ __forceinline__ void multiply_values(const char* v, const uint2 (&weights)[kColumns],
                                                  const uint2 (&weights_low)[kColumns]) {
    using Layout = TileLayout<kHeadDim * WidenV::kBytes>;
    const uint32_t base = shared_address(v) + static_cast<uint32_t>(Layout::chunk_offset(lane_ % 16, lane_ / 16));
#pragma unroll
    for (int chunk = 0; chunk < kHeadDim * WidenV::kBytes / 16; chunk += 2) {
      uint32_t r[4];
      load_matrices_transposed(r, Layout::further(base, 0, chunk));
      if constexpr (WidenV::kBytes == 2) {
        const uint32_t a[4] = {r[0], r[2], r[1], r[3]};
        multiply_value_block(a, chunk / 2, weights, weights_low);
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t a[4];
          WidenV::template widen<ByteOrder::kInterleaved>(r[2 * i], a[0], a[1]);
          WidenV::template widen<ByteOrder::kInterleaved>(r[2 * i + 1], a[2], a[3]);
          multiply_value_block(a, chunk + i, weights, weights_low);
        }
      }
    }
  }

  const Task& task_;
  uint16_t *query_ = nullptr, *query_low_;  // [kRows, Query::kPitch]
  bool is_exact_ = true;                    // the query came in the operands' type: no low part
  RowConstants* rows_;                      // [kRows]
  int lane_;
  float output_[kColumns][kHeadDim / 16][4];  // [.][.][0, 1]: channel half 0 of rows 2t, 2t + 1; [2, 3]: channel half 1
  float base_[kColumns][2];                   // a score of this value has weight 1: the row's reference minus kWeightExponent
  float sum_[kColumns][2];
  unsigned spoiled_rows_ = 0;  // bit 2n + i: row 8n + 2t + i has seen a value that is not finite
  unsigned v_unit_bits_;       // float bits of the power of two that V's token scales are relative to; 0: none seen
};

}  // namespace quantattn::cuda
