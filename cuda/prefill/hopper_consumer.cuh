#pragma once

#include <limits>

#include "prefill/hopper_scores.cuh"
#include "prefill/hopper_shape.cuh"

// One warpgroup's arithmetic: 64 rows against tiles of keys. The scores of a tile are computed beside the output of the tile
// before it, and while one warpgroup is at its softmax another has the tensor cores (Shah et al., FlashAttention-3,
// arXiv:2407.08608). A row's reference is raised lazily (see kMaximumSlack).
namespace quantattn::cuda {

template <class Shape>
class HopperConsumer {
  static constexpr int kKeys = Shape::kKeys, kHeadDim = Shape::kHeadDim;
  static constexpr AtomStrides kQueryStrides = kBlockAfterBlock<kRowsPerConsumer>;
  using ScoreProduct = WarpgroupProduct<kKeys, Shape::kIsBf16>;
  // The assembler wants the sums of one product to fit into the registers that a thread has at launch.
  static constexpr int kOutputColumns = Shape::kIsWidened && kHeadDim > 128 ? 128 : kHeadDim, kOutputSums = kOutputColumns / 2;
  using OutputProduct = WarpgroupProduct<kOutputColumns, Shape::kIsBf16>;

 public:
  __device__ __forceinline__ HopperConsumer(const PrefillTask& task, AtomStrides strides, const HopperMemory<Shape>& memory,
                                            int consumer)
      : task_(task),
        strides_(strides),
        notes_(memory.notes()),
        rows_(notes_.rows + kRowsPerConsumer * consumer),
        keys_(notes_.keys),
        query_memory_(memory.queries(consumer)),
        consumer_(consumer),
        thread_(thread_of_warpgroup()),
        queries_(address_part(shared_address(query_memory_))),
        stages_(address_part(shared_address(memory.stage(0)))) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] = 0.f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      base_[h] = kNoMaximum, sum_[h] = 0.f, rescale_[h] = 1.f;
      factor_[h] = row(h).factor;
    }
    is_special_ = task.alibi_slopes || task.logits_soft_cap > 0.f;
    has_token_scales_ = Shape::kIsWidened && has_token_scales(task);
    is_scanned_ = keys_.is_scanned;
    const int end_tile = keys_.first_tile + keys_.num_tiles;
    first_plain_ = end_tile - max(rows_[0].last_key + 1, 0) / kKeys;
    end_plain_ = end_tile - (rows_[kRowsPerConsumer - 1].first_key + kKeys - 1) / kKeys;
  }

  __device__ __forceinline__ void run() {
    if (keys_.num_tiles == 0) return;
    // The first consumer begins: as if the last one had passed the turn, as it has at the end of a first pass.
    if (consumer_ + 1 == Shape::kConsumers && !keys_.is_scanned) pass_turn();
    begin();
#pragma unroll 1
    for (int i = 1; i < keys_.num_tiles; ++i) step(i);
    end();
  }

  // Calls write(row, maximum, sum) once for each row, by the lanes of its warp twice, and stores the rows, multiplied by what
  // was returned, as 16-bit elements over the queries. False where a sum is not finite.
  template <class Write>
  __device__ __forceinline__ bool finish(bool is_bf16, const Write& write) {
    meet(kConsumerBarrier + consumer_, kWarpgroupThreads);  // all products have read the queries
#pragma unroll
    for (int h = 0; h < 2; ++h)
      for (int distance = 1; distance < 4; distance *= 2) sum_[h] += __shfl_xor_sync(0xFFFFFFFFu, sum_[h], distance);
    const auto of_row = [](const float (&x)[2], int row) {
      const float first = __shfl_sync(0xFFFFFFFFu, x[0], row % 8 * 4), second = __shfl_sync(0xFFFFFFFFu, x[1], row % 8 * 4);
      return row < 8 ? first : second;
    };
    const int lane = thread_ % 32, ended_row = thread_ / 32 * 16 + lane % 16;
    const float maximum = of_row(base_, lane % 16), sum = of_row(sum_, lane % 16);
    const float multiplier = write(ended_row, maximum, sum) * (rows_[ended_row].is_spoilt ? kNan : value_unit());
    const float own_multipliers[2] = {__shfl_sync(0xFFFFFFFFu, multiplier, lane / 4),
                                      __shfl_sync(0xFFFFFFFFu, multiplier, lane / 4 + 8)};
    return is_bf16 ? store_rows<true>(own_multipliers) : store_rows<false>(own_multipliers);
  }

 private:
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  static constexpr float kWeightExponent = Shape::kIsBf16 ? 0.f : 6.f;  // see PrefillEngine

  // Row of the warpgroup that the thread's first sums belong to; its other row is 8 below.
  __device__ __forceinline__ int own_row() const { return thread_ / 32 * 16 + thread_ % 32 / 4; }
  __device__ __forceinline__ PrefillRow& row(int h) const { return rows_[own_row() + 8 * h]; }

  template <bool kIsBf16>
  __device__ __forceinline__ bool store_rows(const float (&multipliers)[2]) {
    float probe[4] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // A row that sees no key is zero, whatever V holds.
      const bool is_empty = base_[h] == kNoMaximum && !isnan(sum_[h]);
      if (__any_sync(0xFFFFFFFFu, is_empty))
#pragma unroll
        for (int i = 0; i < kHeadDim / 4; ++i) {
          float& x = output_[4 * (i / 2) + 2 * h + i % 2];
          x = is_empty ? 0.f : x;
        }
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        const float first = output_[4 * i + 2 * h], second = output_[4 * i + 2 * h + 1];
        probe[2 * h + i % 2] = fmaf(first, 0.f, fmaf(second, 0.f, probe[2 * h + i % 2]));
        *reinterpret_cast<uint32_t*>(query_memory_ + operand_offset<kRowsPerConsumer>(own_row() + 8 * h, i) + thread_ % 4 * 4) =
            kIsBf16 ? pack_bfloat16(first * multipliers[h], second * multipliers[h])
                    : pack_float16(first * multipliers[h], second * multipliers[h]);
      }
    }
    __syncwarp();
    return !isnan(probe[0] + probe[1] + probe[2] + probe[3]);
  }

  // Whether the next stage is full: asked early, the answer is there when it is needed.
  __device__ __forceinline__ bool is_full() const {
    return is_complete(shared_address(&notes_.full[place_.stage]), place_.parity);
  }
  __device__ __forceinline__ void await_stage(bool is_full) const {
    if (!is_full) wait_for(shared_address(&notes_.full[place_.stage]), place_.parity);
  }

  // The warp no longer reads the stage.
  __device__ __forceinline__ void release_stage(int stage) {
    __syncwarp();
    if (thread_ % 32 == 0) arrive(shared_address(&notes_.empty[stage]));
  }

  // Warpgroups take turns at the tensor cores.
  __device__ __forceinline__ void await_turn() const { meet(kTurnBarrier + consumer_, 2 * kWarpgroupThreads); }
  __device__ __forceinline__ void pass_turn() const {
    arrive_at(kTurnBarrier + (consumer_ + 1 == Shape::kConsumers ? 0 : consumer_ + 1), 2 * kWarpgroupThreads);
  }

  __device__ __forceinline__ uint32_t stage_address() const {
    return stages_ + static_cast<uint32_t>(place_.stage) * (Shape::kStageBytes / 16);
  }

  __device__ __forceinline__ void multiply_keys(uint32_t keys, float (&scores)[kKeys / 2]) const {
    const uint32_t queries = own_copy(queries_);
    keys = own_copy(keys);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const uint32_t block = k / 4, inner = k % 4 * 2;
      ScoreProduct::keys(scores, describe_operand(queries + block * kQueryStrides.block + inner, kQueryStrides),
                         describe_operand(keys + block * strides_.block + inner, strides_), k > 0);
    }
  }

  __device__ __forceinline__ void multiply_values() {
    const uint32_t values = own_copy(stage_address());
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
      for (int i = 0; i < kHeadDim / kOutputColumns; ++i) {
        const uint32_t group = 2 * k, block = kOutputColumns / kBlockColumns * i;
        OutputProduct::values(reinterpret_cast<float (&)[kOutputSums]>(output_[kOutputSums * i]), weights_ + 4 * k,
                              describe_operand(values + group * strides_.group + block * strides_.block, strides_));
      }
  }

  __device__ __forceinline__ void await_values(int i, bool is_full) {
    await_stage(is_full);
    if (is_scanned_ && keys_.is_guarded(i)) note_spoilt_rows(notes_.bad_keys[place_.stage], keys_.first_key(i));
  }

  // Scores of the first tile.
  __device__ __forceinline__ void begin() {
    float scores[kKeys / 2];
    await_stage(false);
    begin_products();
    multiply_keys(stage_address(), scores);
    commit_products();
    if (has_token_scales_) await_scales(0);
    wait_products<0>();
    pin(scores);
    release_stage(place_.stage);
    place_.advance();
    weigh(0, scores);
    is_next_full_ = is_full();
    pack(scores);
  }

  // Scores of tile i, output of tile i - 1.
  __device__ __forceinline__ void step(int i) {
    float scores[kKeys / 2];
    await_stage(is_next_full_);
    const int key_stage = place_.stage;
    const uint32_t keys = stage_address();
    place_.advance();
    const bool has_values = is_full();
    await_turn();
    begin_products();
    multiply_keys(keys, scores);
    commit_products();
    await_values(i - 1, has_values);
    begin_products();
    multiply_values();
    commit_products();
    pass_turn();
    if (has_token_scales_) await_scales(i);
    wait_products<1>();
    pin(scores);
    release_stage(key_stage);
    const bool raised = weigh(i, scores);
    wait_products<0>();
    pin(output_);
    pin(weights_);
    release_stage(place_.stage);
    place_.advance();
    is_next_full_ = is_full();
    if (raised) rescale_output();
    pack(scores);
  }

  // Output of the last tile.
  __device__ __forceinline__ void end() {
    await_values(keys_.num_tiles - 1, is_next_full_);
    begin_products();
    multiply_values();
    commit_products();
    wait_products<0>();
    pin(output_);
  }

  // Turns scores into weights and adds them to the sums. True where the output so far must be rescaled.
  __device__ __forceinline__ bool weigh(int i, float (&scores)[kKeys / 2]) {
    float factor[2] = {factor_[0], factor_[1]};
    float unit_rescale = 1.f;
    if (has_token_scales_) multiply_scales(i, scores, unit_rescale);
    const bool is_masked = i < first_plain_ || i >= end_plain_;
    if (is_masked || is_special_) {
      const int own_key = keys_.first_key(i) + thread_ % 4 * 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (is_special_) transform_scores(task_, row(h), factor_[h], own_key, h, scores), factor[h] = 1.f;
        if (is_masked) mask_scores(row(h), own_key, h, scores);
      }
    }
    float largest[2];
    const bool raised = __any_sync(0xFFFFFFFFu, exceeds_bases(scores, factor, largest));
    if (raised) raise_bases(largest);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sums[2] = {0.f, 0.f};
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[4 * n + 2 * h + j];
          score = exp2_approx(fmaf(score, factor[h], -base_[h]));
          sums[j] += score;
        }
      sum_[h] += sums[0] + sums[1];
    }
    return follow_value_unit(unit_rescale, raised);
  }

  __device__ __forceinline__ void await_scales(int i) const {
    if constexpr (Shape::kIsWidened) wait_for(shared_address(&notes_.scales_full[i % 2]), i / 2 % 2);
  }

  // Multiplies by the tile's K scales, and takes what else lies in their slot.
  __device__ __forceinline__ void multiply_scales(int i, float (&scores)[kKeys / 2], float& unit_rescale) {
    if constexpr (Shape::kIsWidened) {
      const auto& slot = notes_.scales[i % 2];
      unit_rescale = slot.rescale;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        const float2 scale = *reinterpret_cast<const float2*>(slot.k + 8 * n + thread_ % 4 * 2);
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[4 * n + j] *= j % 2 == 0 ? scale.x : scale.y;
      }
      if (is_scanned_ && keys_.is_guarded(i)) note_spoilt_rows(slot.bad_keys, keys_.first_key(i));
      arrive(shared_address(&notes_.scales_empty[i % 2]));
    }
  }

  // True where the output so far must be rescaled, be it that the unit of V's scales has grown with this tile.
  __device__ __forceinline__ bool follow_value_unit(float unit_rescale, bool raised) {
    if constexpr (Shape::kIsWidened)
      if (unit_rescale != 1.f) {
#pragma unroll
        for (int h = 0; h < 2; ++h) rescale_[h] = raised ? rescale_[h] * unit_rescale : unit_rescale;
        return true;
      }
    return raised;
  }

  // What V's scales of single tokens are relative to.
  __device__ __forceinline__ float value_unit() const {
    if constexpr (Shape::kIsWidened)
      if (has_token_scales_ && keys_.num_tiles > 0) return notes_.scales[(keys_.num_tiles - 1) % 2].unit;
    return 1.f;
  }

  // Finds the largest score of the thread's part of each row, as a base; true where one is too far above the row's.
  __device__ __forceinline__ bool exceeds_bases(const float (&scores)[kKeys / 2], const float (&factor)[2],
                                                float (&largest)[2]) const {
    bool exceeds = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = fmaxf(scores[2 * h], scores[2 * h + 1]);
#pragma unroll
      for (int n = 1; n < kKeys / 8; ++n) most = fmaxf(most, fmaxf(scores[4 * n + 2 * h], scores[4 * n + 2 * h + 1]));
      largest[h] = most * factor[h] - kWeightExponent;
      exceeds |= largest[h] - base_[h] > kMaximumSlack;
    }
    return exceeds;
  }

  // Of the rows that exceed theirs; what happens to a row does not depend on its neighbours.
  __device__ __forceinline__ void raise_bases(const float (&largest)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float raised = largest[h];
      for (int distance = 1; distance < 4; distance *= 2)
        raised = fmaxf(raised, __shfl_xor_sync(0xFFFFFFFFu, raised, distance));
      if (!(raised - base_[h] > kMaximumSlack)) raised = base_[h];
      rescale_[h] = exp2_approx(base_[h] - raised);
      base_[h] = raised;
      sum_[h] *= rescale_[h];
    }
  }

  __device__ __forceinline__ void rescale_output() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] *= rescale_[i / 2 % 2];
  }

  __device__ __forceinline__ void pack(const float (&scores)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i)
      weights_[i] =
          Shape::kIsBf16 ? pack_bfloat16(scores[2 * i], scores[2 * i + 1]) : pack_float16(scores[2 * i], scores[2 * i + 1]);
  }

  // Notes which of the thread's rows see a key of a scanned tile that was bad.
  template <int kWords>
  __device__ __forceinline__ void note_spoilt_rows(const uint32_t (&bad_keys)[kWords], int first_key) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      uint32_t bad = bad_keys[word];
      while (bad != 0) {
        const int key = first_key + 32 * word % kKeys + __ffs(static_cast<int>(bad)) - 1;
        bad &= bad - 1;
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (key >= row(h).first_key && key <= row(h).last_key) row(h).is_spoilt = true;
      }
    }
  }

  const PrefillTask& task_;
  const AtomStrides strides_;
  HopperNotes<Shape>& notes_;
  PrefillRow* rows_;
  const KeyRange<Shape>& keys_;  // in shared memory, like much of this: registers are scarce
  char* query_memory_;
  RingPlace<Shape::kStages> place_;
  int consumer_, thread_;
  uint32_t queries_, stages_;  // in units of 16 bytes
  bool is_special_, has_token_scales_, is_scanned_, is_next_full_;
  int first_plain_, end_plain_;  // all rows see the tiles [first_plain_, end_plain_) wholly
  float output_[kHeadDim / 2];
  uint32_t weights_[kKeys / 4];  // of the tile whose output comes next
  float factor_[2], base_[2], sum_[2], rescale_[2];
};

}  // namespace quantattn::cuda
