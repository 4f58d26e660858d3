#pragma once

#include "prefill/key_tiles.cuh"
#include "prefill/row_constants.cuh"

// One warp's arithmetic: its rows against tiles of keys, on tensor cores (m16n8k16), by the algorithm of FlashAttention-2 (Dao,
// arXiv:2307.08691). The rows are the M operand. A row's reference is raised lazily (see kMaximumSlack), so the sums of most
// tiles are not rescaled.
namespace quantattn::cuda {

template <class KFormat, class VFormat, int kPaddedHeadDim, int kTilesOfRows>
class PrefillEngine {
  using WidenK = Widen<KFormat>;
  using WidenV = Widen<VFormat>;

 public:
  static constexpr int kHeadDim = kPaddedHeadDim, kRowTiles = kTilesOfRows, kRows = 16 * kRowTiles;
  using Layout = OperandLayout<kHeadDim>;

  // `queries`: the warp's rows as operands. `rows`: their constants.
  __device__ __forceinline__ PrefillEngine(const PrefillTask& task, const RowTile& tile, const char* queries,
                                           const PrefillRow* rows, int lane)
      : task_(task), tile_(tile), queries_(shared_address(queries)), rows_(rows), lane_(lane) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) base_[m][i] = kNoMaximum, sum_[m][i] = 0.f;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) output_[m][n][i] = 0.f;
    }
  }

  // Half tiles [first_half, end_half) of a row tile's keys hold every key that some row of the warp sees.
  __device__ __forceinline__ int first_half() const { return max(rows_[0].first_key - tile_.first_key, 0) / kHalfKeys; }
  __device__ __forceinline__ int end_half() const {
    return (rows_[kRows - 1].last_key - tile_.first_key + kHalfKeys) / kHalfKeys;
  }

  // Scores of half tile `half + 1` where there is one, beside the weights and sums of `half` where there is one.
  template <bool kHasCurrent, bool kHasNext, class Tiles>
  __device__ __forceinline__ void advance(const Tiles& tiles, int half) {
    const int tile = half / 2, next_tile = (half + 1) / 2, first_key = half % 2 * kHalfKeys;
    float next_scores[kRowTiles][kScoreTiles][4] = {};
    uint32_t weights[kRowTiles][kHalfKeys / 16][4];
    const float* v_scales = nullptr;
    if constexpr (kHasCurrent && VFormat::kHasScale) {
      v_scales = tiles.v_scale(tile);
      raise_value_unit(v_scales);
      v_scales += first_key;
    }
    const uint32_t keys = shared_address(tiles.k(next_tile)) + (half + 1) % 2 * (kHalfKeys * Layout::kRowBytes);
#pragma unroll
    for (int block = 0; block < kHeadDim / 16; ++block) {
      if constexpr (kHasNext) multiply_key_block(keys, block, next_scores);
      if constexpr (kHasCurrent) compute_weights(block, v_scales, weights);
    }
    if constexpr (kHasCurrent)
      multiply_values(shared_address(tiles.v(tile)) + half % 2 * (kHalfKeys * Layout::kRowBytes), weights);
    if constexpr (kHasNext) {
      if constexpr (KFormat::kHasScale) scale_scores(tiles.k_scale(next_tile) + (half + 1) % 2 * kHalfKeys, next_scores);
      transform_scores(tile_.first_key + (half + 1) * kHalfKeys, next_scores);
      raise_bases(next_scores);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) scores_[m][n][i] = next_scores[m][n][i];
    }
  }

  // Calls write(row, maximum, sum) for each of the thread's rows, then stores the row, multiplied by what was returned, as
  // 16-bit elements over the operands.
  template <class Write>
  __device__ __forceinline__ void finish(char* rows, bool is_bf16, float v_scale, const Write& write) {
    const float unit = (v_unit_bits_ == 0 ? 1.f : __uint_as_float(v_unit_bits_)) * WidenV::kFactor * v_scale;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = sum_[m][i];
        for (int distance = 1; distance < 4; distance *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
        const int row = 16 * m + 8 * i + lane_ / 4;
        const float multiplier = write(row, base_[m][i], sum) * unit;
        // A row that sees no key is zero, whatever V holds.
        const bool is_empty = base_[m][i] == kNoMaximum && !isnan(sum);
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          const float first = is_empty ? 0.f : output_[m][n][2 * i] * multiplier,
                      second = is_empty ? 0.f : output_[m][n][2 * i + 1] * multiplier;
          *reinterpret_cast<uint32_t*>(rows + Layout::chunk_offset(row, n) + lane_ % 4 * 4) =
              is_bf16 ? pack_bfloat16(first, second) : pack_float16(first, second);
        }
      }
    __syncwarp();
  }

 private:
  static constexpr int kHalfKeys = kKeysPerTile / 2, kScoreTiles = kHalfKeys / 8;  // of 8 keys: the N of the scores
  // Weights that are float16 have 2^6 in front, so that those below 2^-20 of the largest only become subnormal.
  static constexpr float kWeightExponent = WidenV::kIsBf16 ? 0.f : 6.f;

  __device__ __forceinline__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint2 b, bool is_bf16) {
    if (is_bf16)
      multiply_bfloat16(c, a, b);
    else
      multiply_float16(c, a, b);
  }

  // The 16 channels of `block` join the scores.
  __device__ __forceinline__ void multiply_key_block(uint32_t keys, int block, float (&scores)[kRowTiles][kScoreTiles][4]) {
    const int key = lane_ % 8 + lane_ / 16 * 8, key_chunk = lane_ / 8 % 2;
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
      load_matrices(a[m], queries_ + Layout::chunk_offset(16 * m + lane_ % 16, 2 * block + lane_ / 16));
#pragma unroll
    for (int n = 0; n < kScoreTiles; n += 2) {
      uint32_t b[4];
      load_matrices(b, keys + Layout::chunk_offset(8 * n + key, 2 * block + key_chunk));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply(scores[m][n], a[m], {b[0], b[1]}, WidenK::kIsBf16);
        multiply(scores[m][n + 1], a[m], {b[2], b[3]}, WidenK::kIsBf16);
      }
    }
  }

  __device__ __forceinline__ void scale_scores(const float* k_scales, float (&scores)[kRowTiles][kScoreTiles][4]) const {
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      const float2 scale = *reinterpret_cast<const float2*>(k_scales + 8 * n + lane_ % 4 * 2);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][n][i] *= i % 2 == 0 ? scale.x : scale.y;
    }
  }

  // On return score * factors_ is final, and the factor is positive.
  __device__ __forceinline__ void transform_scores(int first_key, float (&scores)[kRowTiles][kScoreTiles][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) factors_[m][i] = row(m, i).factor;
    const float cap = task_.logits_soft_cap;
    const auto for_each_score = [&](const auto& transform) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const PrefillRow& own = row(m, i);
#pragma unroll
          for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) transform(scores[m][n][2 * i + j], own, factors_[m][i], 8 * n + j);
        }
    };
    const int own_key = first_key + lane_ % 4 * 2;
    if (cap > 0.f)
      for_each_score([&](float& score, const PrefillRow&, float factor, int) { score = cap_score(score * factor, cap); });
    if (task_.alibi_slopes)
      for_each_score([&](float& score, const PrefillRow& own, float factor, int key) {
        score = fmaf(own.slope, static_cast<float>(own_key + key - own.position), cap > 0.f ? score : score * factor);
      });
    if (cap > 0.f || task_.alibi_slopes)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) factors_[m][0] = factors_[m][1] = 1.f;
    if (needs_mask(first_key))
      for_each_score([&](float& score, const PrefillRow& own, float, int key) {
        if (key < own.first_key - own_key || key > own.last_key - own_key) score = -INFINITY;
      });
  }

  // The thread's row i of row tile m.
  __device__ __forceinline__ const PrefillRow& row(int m, int i) const { return rows_[16 * m + 8 * i + lane_ / 4]; }

  // True where some row of the warp may not see every key of the tile.
  __device__ __forceinline__ bool needs_mask(int first_key) const {
    const PrefillRow &first = rows_[0], &last = rows_[kRows - 1];
    return first_key < last.first_key || first_key + kHalfKeys - 1 > first.last_key;
  }

  __device__ __forceinline__ void raise_bases(const float (&scores)[kRowTiles][kScoreTiles][4]) {
    float largest[kRowTiles][2];
    bool exceeds = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float most = fmaxf(scores[m][0][2 * i], scores[m][0][2 * i + 1]);
#pragma unroll
        for (int n = 1; n < kScoreTiles; ++n) most = fmaxf(most, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
        largest[m][i] = most * factors_[m][i] - kWeightExponent;
        exceeds |= largest[m][i] - base_[m][i] > kMaximumSlack;
      }
    if (!__any_sync(0xFFFFFFFFu, exceeds)) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float raised = largest[m][i];
        for (int distance = 1; distance < 4; distance *= 2)
          raised = fmaxf(raised, __shfl_xor_sync(0xFFFFFFFFu, raised, distance));
        raised = fmaxf(raised, base_[m][i]);
        const float rescale = exp2_approx(base_[m][i] - raised);
        base_[m][i] = raised;
        sum_[m][i] *= rescale;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) output_[m][n][2 * i] *= rescale, output_[m][n][2 * i + 1] *= rescale;
      }
  }

  // Scales of single tokens join the weights, relative to a power of two above the largest so far: whatever the magnitude of
  // V, the product stays in float16's range.
  __device__ __forceinline__ void raise_value_unit(const float* v_scales) {
    const float largest = fmaxf(fabsf(v_scales[lane_]), fabsf(v_scales[lane_ + 32]));
    const unsigned unit_bits = __reduce_max_sync(0xFFFFFFFFu, __float_as_uint(largest)) & 0x7F800000u;
    if (unit_bits <= v_unit_bits_) return;
    const float old_unit = __uint_as_float(v_unit_bits_);
    v_unit_bits_ = unit_bits;
    const float rescale = old_unit * inverse_value_unit();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) output_[m][n][i] *= rescale;
  }

  __device__ __forceinline__ float inverse_value_unit() const { return __uint_as_float(0x7F000000u - v_unit_bits_); }

  // The share of the weights that goes with a block of channels of the next scores: tensor cores and the others work side by
  // side. Each step takes 8 keys of a row tile: two registers of operands.
  __device__ __forceinline__ void compute_weights(int block, const float* v_scales,
                                                  uint32_t (&weights)[kRowTiles][kHalfKeys / 16][4]) {
    constexpr int kSteps = kRowTiles * kScoreTiles, kBlocks = kHeadDim / 16;
#pragma unroll
    for (int step = block * kSteps / kBlocks; step < (block + 1) * kSteps / kBlocks; ++step) {
      const int m = step / kScoreTiles, n = step % kScoreTiles;
      float v_scale[2] = {1.f, 1.f};
      if constexpr (VFormat::kHasScale)
#pragma unroll
        for (int i = 0; i < 2; ++i) v_scale[i] = v_scales[8 * n + lane_ % 4 * 2 + i] * inverse_value_unit();
      float w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[i] = exp2_approx(fmaf(scores_[m][n][i], factors_[m][i / 2], -base_[m][i / 2]));
        sum_[m][i / 2] += w[i];
        if constexpr (VFormat::kHasScale) w[i] *= v_scale[i % 2];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        weights[m][n / 2][n % 2 * 2 + i] =
            WidenV::kIsBf16 ? pack_bfloat16(w[2 * i], w[2 * i + 1]) : pack_float16(w[2 * i], w[2 * i + 1]);
    }
  }

  __device__ __forceinline__ void multiply_values(uint32_t values, const uint32_t (&weights)[kRowTiles][kHalfKeys / 16][4]) {
#pragma unroll
    for (int block = 0; block < kHalfKeys / 16; ++block)  // of 16 keys
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, values + Layout::chunk_offset(16 * block + lane_ % 16, n + lane_ / 16));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply(output_[m][n], weights[m][block], {b[0], b[1]}, WidenV::kIsBf16);
          multiply(output_[m][n + 1], weights[m][block], {b[2], b[3]}, WidenV::kIsBf16);
        }
      }
  }

  const PrefillTask& task_;
  const RowTile& tile_;
  uint32_t queries_;
  const PrefillRow* rows_;
  int lane_;
  float output_[kRowTiles][kHeadDim / 8][4];  // [.][.][0, 1]: channels 2t, 2t + 1 of row g; [2, 3]: of row g + 8
  float scores_[kRowTiles][kScoreTiles][4];   // of the half tile under way, to be multiplied by the factors
  float factors_[kRowTiles][2];
  float base_[kRowTiles][2];  // a score of this value has weight 1
  float sum_[kRowTiles][2];
  unsigned v_unit_bits_ = 0;  // float bits of the power of two that V's token scales are relative to; 0: none seen
};

}  // namespace quantattn::cuda
