#pragma once

#include <limits>

#include "prefill/key_tiles.cuh"
#include "prefill/row_constants.cuh"

// One warp's arithmetic: its rows against tiles of keys, on tensor cores (m16n8k16), by the algorithm of FlashAttention-2 (Dao,
// arXiv:2307.08691). The rows are the M operand. A row's reference is raised lazily (see kMaximumSlack), so the sums of most
// tiles are not rescaled.
namespace quantattn::cuda {

template <class KFormat, class VFormat, int kPaddedHeadDim, int kTilesOfRows, int kKeysPerTile>
class PrefillEngine {
  using WidenK = Widen<KFormat>;
  using WidenV = Widen<VFormat>;

 public:
  static constexpr int kHeadDim = kPaddedHeadDim, kRowTiles = kTilesOfRows, kRows = 16 * kRowTiles;
  using Layout = OperandLayout<kHeadDim>;

  // `queries`: the warp's rows as operands. `rows`: their constants.
  __device__ __forceinline__ PrefillEngine(const PrefillTask& task, const RowTile& tile, const char* queries, PrefillRow* rows)
      : task_(task), tile_(tile), queries_(shared_address(queries)), rows_(rows) {
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

  // Whether some row of the warp sees a key of the tile that begins with `first_key`.
  __device__ __forceinline__ bool sees_tile(int first_key) const {
    return first_key <= rows_[kRows - 1].last_key && first_key + kKeysPerTile > rows_[0].first_key;
  }

  template <class Tiles>
  __device__ __forceinline__ void process(const Tiles& tiles, int index) {
    float scores[kRowTiles][kKeyTiles][4] = {};
    multiply_keys(shared_address(tiles.k(index)), scores);
    if constexpr (KFormat::kHasScale) scale_scores(tiles.k_scale(index), scores);
    float factors[kRowTiles][2];
    transform_scores(tiles.first_key(index), scores, factors);
    raise_bases(scores, factors);
    const float* v_scales = nullptr;
    if constexpr (VFormat::kHasScale) {
      v_scales = tiles.v_scale(index);
      raise_value_unit(v_scales);
    }
    multiply_values(shared_address(tiles.v(index)), scores, factors, v_scales);
    if (const uint64_t bad_keys = tiles.bad_keys(index)) note_spoilt_rows(tiles.first_key(index), bad_keys);
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
        const int lane = own_lane(), row = 16 * m + 8 * i + lane / 4;
        float multiplier = write(row, base_[m][i], sum);
        if (multiplier != 0.f) multiplier *= rows_[row].is_spoilt ? kNan : unit;  // a row that sees no key is zero
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          const float first = output_[m][n][2 * i] * multiplier, second = output_[m][n][2 * i + 1] * multiplier;
          *reinterpret_cast<uint32_t*>(rows + Layout::chunk_offset(row, n) + lane % 4 * 4) =
              is_bf16 ? pack_bfloat16(first, second) : pack_float16(first, second);
        }
      }
    __syncwarp();
  }

 private:
  static constexpr int kKeyTiles = kKeysPerTile / 8;  // of 8 keys: the N of the scores
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  // Weights that are float16 have 2^6 in front, so that those below 2^-20 of the largest only become subnormal.
  static constexpr float kWeightExponent = WidenV::kIsBf16 ? 0.f : 6.f;

  // Read anew by each step: kept, it and what is computed from it would take registers from every tile.
  __device__ __forceinline__ static int own_lane() { return thread_index() % 32; }

  __device__ __forceinline__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint2 b, bool is_bf16) {
    if (is_bf16)
      multiply_bfloat16(c, a, b);
    else
      multiply_float16(c, a, b);
  }

  __device__ __forceinline__ void multiply_keys(uint32_t keys, float (&scores)[kRowTiles][kKeyTiles][4]) {
    const int lane = own_lane(), key = lane % 8 + lane / 16 * 8, key_chunk = lane / 8 % 2;
#pragma unroll
    for (int block = 0; block < kHeadDim / 16; ++block) {  // of 16 channels
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        load_matrices(a[m], queries_ + Layout::chunk_offset(16 * m + lane % 16, 2 * block + lane / 16));
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[4];
        load_matrices(b, keys + Layout::chunk_offset(8 * n + key, 2 * block + key_chunk));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply(scores[m][n], a[m], {b[0], b[1]}, WidenK::kIsBf16);
          multiply(scores[m][n + 1], a[m], {b[2], b[3]}, WidenK::kIsBf16);
        }
      }
    }
  }

  __device__ __forceinline__ void scale_scores(const float* k_scales, float (&scores)[kRowTiles][kKeyTiles][4]) const {
    const int lane = own_lane();
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      const float2 scale = *reinterpret_cast<const float2*>(k_scales + 8 * n + lane % 4 * 2);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][n][i] *= i % 2 == 0 ? scale.x : scale.y;
    }
  }

  // On return score * factor is final, and factor is positive.
  __device__ __forceinline__ void transform_scores(int first_key, float (&scores)[kRowTiles][kKeyTiles][4],
                                                   float (&factors)[kRowTiles][2]) const {
    const int lane = own_lane();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) factors[m][i] = row(m, i, lane).factor;
    const float cap = task_.logits_soft_cap;
    const auto for_each_score = [&](const auto& transform) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const PrefillRow& own = row(m, i, lane);
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) transform(scores[m][n][2 * i + j], own, factors[m][i], 8 * n + j);
        }
    };
    const int own_key = first_key + lane % 4 * 2;
    if (cap > 0.f) {
      const float inner = 2.f * kLog2e / cap, outer = cap * kLog2e;
      for_each_score([&](float& score, const PrefillRow& own, float factor, int) {
        score = cap_score(fmaf(score, factor, own.offset), inner, outer);
      });
    }
    if (task_.alibi_slopes)
      for_each_score([&](float& score, const PrefillRow& own, float factor, int key) {
        score = fmaf(own.slope, static_cast<float>(own_key + key - own.position), cap > 0.f ? score : score * factor);
      });
    if (cap > 0.f || task_.alibi_slopes)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) factors[m][0] = factors[m][1] = 1.f;
    if (hides_last_keys(rows_[0], first_key, kKeysPerTile))
      for_each_score([&](float& score, const PrefillRow& own, float, int key) {
        if (key > own.last_key - own_key) score = -INFINITY;
      });
    if (hides_first_keys(rows_[kRows - 1], first_key))
      for_each_score([&](float& score, const PrefillRow& own, float, int key) {
        if (key < own.first_key - own_key) score = -INFINITY;
      });
  }

  // The thread's row i of row tile m.
  __device__ __forceinline__ PrefillRow& row(int m, int i, int lane) const { return rows_[16 * m + 8 * i + lane / 4]; }

  __device__ __forceinline__ void raise_bases(const float (&scores)[kRowTiles][kKeyTiles][4],
                                              const float (&factors)[kRowTiles][2]) {
    float largest[kRowTiles][2];
    bool exceeds = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float most = fmaxf(scores[m][0][2 * i], scores[m][0][2 * i + 1]);
#pragma unroll
        for (int n = 1; n < kKeyTiles; ++n) most = fmaxf(most, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
        largest[m][i] = most * factors[m][i] - kWeightExponent;
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
    const int lane = own_lane();
    float largest = fabsf(v_scales[lane % kKeysPerTile]);
    if constexpr (kKeysPerTile > 32) largest = fmaxf(largest, fabsf(v_scales[lane + 32]));
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

  // Weights of 8 keys as two registers of operands: rows g, then rows g + 8.
  __device__ __forceinline__ void weigh(int m, const float (&scores)[4], const float (&factors)[2], const float2& v_scale,
                                        uint32_t& first, uint32_t& second) {
    float w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      w[i] = exp2_approx(fmaf(scores[i], factors[i / 2], -base_[m][i / 2]));
      sum_[m][i / 2] += w[i];
      if constexpr (VFormat::kHasScale) w[i] *= i % 2 == 0 ? v_scale.x : v_scale.y;
    }
    first = WidenV::kIsBf16 ? pack_bfloat16(w[0], w[1]) : pack_float16(w[0], w[1]);
    second = WidenV::kIsBf16 ? pack_bfloat16(w[2], w[3]) : pack_float16(w[2], w[3]);
  }

  __device__ __forceinline__ void multiply_values(uint32_t values, const float (&scores)[kRowTiles][kKeyTiles][4],
                                                  const float (&factors)[kRowTiles][2], const float* v_scales) {
    const int lane = own_lane();
#pragma unroll
    for (int block = 0; block < kKeysPerTile / 16; ++block) {  // of 16 keys
      float2 v_scale[2] = {};
      if constexpr (VFormat::kHasScale)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          v_scale[i] = *reinterpret_cast<const float2*>(v_scales + 16 * block + 8 * i + lane % 4 * 2);
          v_scale[i].x *= inverse_value_unit(), v_scale[i].y *= inverse_value_unit();
        }
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        weigh(m, scores[m][2 * block], factors[m], v_scale[0], a[m][0], a[m][1]);
        weigh(m, scores[m][2 * block + 1], factors[m], v_scale[1], a[m][2], a[m][3]);
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, values + Layout::chunk_offset(16 * block + lane % 16, n + lane / 16));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply(output_[m][n], a[m], {b[0], b[1]}, WidenV::kIsBf16);
          multiply(output_[m][n + 1], a[m], {b[2], b[3]}, WidenV::kIsBf16);
        }
      }
    }
  }

  __device__ __forceinline__ void note_spoilt_rows(int first_key, uint64_t bad_keys) {
#pragma unroll 1
    for (int key = 0; key < kKeysPerTile; ++key) {
      if ((bad_keys >> key & 1u) == 0) continue;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (PrefillRow& own = row(m, i, own_lane()); first_key + key >= own.first_key && first_key + key <= own.last_key)
            own.is_spoilt = true;
    }
  }

  const PrefillTask& task_;
  const RowTile& tile_;
  uint32_t queries_;
  PrefillRow* rows_;
  float output_[kRowTiles][kHeadDim / 8][4];  // [.][.][0, 1]: channels 2t, 2t + 1 of row g; [2, 3]: of row g + 8
  float base_[kRowTiles][2];                  // a score of this value has weight 1
  float sum_[kRowTiles][2];
  unsigned v_unit_bits_ = 0;  // float bits of the power of two that V's token scales are relative to; 0: none seen
};

}  // namespace quantattn::cuda
