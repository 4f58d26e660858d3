#pragma once

#include "prefill/hopper_shape.cuh"

// Two warps handle guarded V tiles (see KeyRange::is_guarded) between the copy and the products.
//
// The weight of a value that a row does not see is zero, but zero times NaN is not. What was not brought becomes zeros. Values
// that another row does see are rarely NaN, and to look at them all takes a tenth of the kernel's time: so a block trusts them,
// and only if an output is not finite, it computes all again in a second pass, in which values that are not finite are taken
// out of tiles that some row does not see wholly; rows that see them become NaN at the end.
namespace quantattn::cuda {

// True where one of eight 16-bit operands is not finite: all bits of its exponent are set, and adding one to it reaches the
// sign.
template <bool kIsBf16>
__device__ __forceinline__ bool has_bad_value(const uint4& x) {
  constexpr uint32_t kExponent = kIsBf16 ? 0x7F807F80u : 0x7C007C00u, kOne = kIsBf16 ? 0x00800080u : 0x04000400u;
  const auto raised = [](uint32_t pair) { return (pair & kExponent) + kOne; };
  return ((raised(x.x) | raised(x.y) | raised(x.z) | raised(x.w)) & 0x80008000u) != 0;
}

template <class Shape>
class HopperGuard {
  static constexpr int kThreads = 64, kChunks = Shape::kHeadDim / 8;

 public:
  __device__ __forceinline__ HopperGuard(const HopperTask& task, const HopperMemory<Shape>& memory)
      : strides_(tile_strides<Shape>(task)),
        memory_(memory),
        notes_(memory.notes()),
        thread_(static_cast<int>(threadIdx.x) - 32) {}

  __device__ __forceinline__ void run() {
    const KeyRange<Shape>& keys = notes_.keys;
#pragma unroll 1
    for (int i = 0; i < keys.num_tiles; ++i)
      if (keys.is_guarded(i))
        clean(keys.step_of_value(i), keys.live_from - keys.first_key(i), keys.live_to - keys.first_key(i));
  }

 private:
  // Rows [first_row, end_row) of the tile have been brought.
  __device__ __forceinline__ void clean(int step, int first_row, int end_row) {
    const int stage = step % Shape::kStages;
    wait_for(shared_address(&notes_.unguarded[stage]), parities_ >> stage & 1u);
    parities_ ^= 1u << stage;
    clear_rows(stage, 0, first_row);
    clear_rows(stage, end_row, Shape::kKeys);
    if (notes_.keys.is_scanned) {
      // The consumers have read what was noted of the tile before.
      wait_for(shared_address(&notes_.empty[stage]), step / Shape::kStages % 2 ^ 1);
      take_out_bad_values(stage);
    }
    publish_to_async_proxy();
    meet(kGuardBarrier, kThreads);
    if (thread_ == 0) arrive(shared_address(&notes_.full[stage]));
  }

  __device__ __forceinline__ uint4& chunk_at(int stage, int i) const {
    return *reinterpret_cast<uint4*>(memory_.stage(stage) + operand_offset(strides_, i / kChunks, i % kChunks));
  }

  __device__ __forceinline__ void clear_rows(int stage, int first_row, int end_row) const {
#pragma unroll 1
    for (int i = first_row * kChunks + thread_; i < end_row * kChunks; i += kThreads) chunk_at(stage, i) = {};
  }

  __device__ __forceinline__ void take_out_bad_values(int stage) const {
    constexpr int kAtOnce = Shape::kProducerRegisters < 40 ? 2 : 4;  // loads under way; the consumers wait for this
    if (thread_ == 0)
      for (uint32_t& keys : notes_.bad_keys[stage]) keys = 0;
    meet(kGuardBarrier, kThreads);  // nothing is noted yet, and missing rows are zeros
#pragma unroll 1
    for (int first = thread_; first < Shape::kKeys * kChunks; first += kAtOnce * kThreads) {
      uint4 x[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        x[j] = first + j * kThreads < Shape::kKeys * kChunks ? chunk_at(stage, first + j * kThreads) : uint4{};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (!has_bad_value<Shape::kIsBf16>(x[j])) continue;
        const int i = first + j * kThreads, row = i / kChunks;
        chunk_at(stage, i) = {};
        atomicOr(&notes_.bad_keys[stage][row / 32], 1u << row % 32);
      }
    }
  }

  const AtomStrides strides_;
  const HopperMemory<Shape>& memory_;
  HopperNotes<Shape>& notes_;
  int thread_;
  uint32_t parities_ = 0;  // of the next phase of each stage's barrier
};

}  // namespace quantattn::cuda
