#pragma once

#include "prefill/hopper_guard.cuh"

// The warpgroup that turns copied tiles of 8-bit codes into 16-bit operands, a row, or half of one of 256 codes, by each
// thread. On the way it does what HopperGuard does for tiles of 16 bits, and multiplies values by the scales of their tokens.
namespace quantattn::cuda {

template <class Shape>
class HopperWidener {
  using WidenCodes = Widen<typename Shape::Format>;
  static constexpr int kKeys = Shape::kKeys, kParts = kWarpgroupThreads / kKeys;
  static constexpr int kChunks = Shape::kHeadDim / kParts / 16;  // of a thread, 16 codes each
  static_assert(kKeys * kParts == kWarpgroupThreads && (kParts == 1 || kChunks * 16 == Shape::kBoxColumns));
  static_assert(!WidenCodes::kIsBf16 && WidenCodes::kFactor == 1.f);

 public:
  __device__ __forceinline__ HopperWidener(const HopperMemory<Shape>& memory, bool has_token_scales)
      : memory_(memory), notes_(memory.notes()), has_token_scales_(has_token_scales) {}

  __device__ __forceinline__ void run() {
    const KeyRange<Shape>& keys = notes_.keys;
    // In the order of the ring. The number of tiles is read anew: a register is worth more than the time.
#pragma unroll 1
    for (int i = 0; i <= keys.num_tiles; ++i) {
      if (i < keys.num_tiles) widen<false, false>(0, kOne);
      if (i > 0) widen_value(i - 1);
    }
  }

 private:
  __device__ __forceinline__ void widen_value(int tile) {
    if (notes_.keys.is_guarded(tile))
      widen<true, true>(notes_.keys.first_key(tile), has_token_scales_ ? take_scale(tile) : kOne);
    else if (has_token_scales_)
      widen<false, true>(0, take_scale(tile));
    else
      widen<false, false>(0, kOne);
  }

  // In a guarded tile, rows that were not brought become zeros; so do values that are not finite where they are looked for.
  template <bool kIsGuarded, bool kIsScaled>
  __device__ __forceinline__ void widen(int first_key, uint32_t scale) {
    uint4 codes[kChunks];
    load(codes);
    wait_for(shared_address(&notes_.empty[target_.stage]), target_.parity ^ 1);
    const KeyRange<Shape>& keys = notes_.keys;
    const int thread = thread_of_warpgroup(), row = thread % kKeys, part = thread / kKeys;
    const bool is_live = first_key + row >= keys.live_from && first_key + row < keys.live_to;
    bool is_bad = false;
    const uint32_t to = shared_address(memory_.stage(target_.stage)) + part * (kChunks / 4 * kKeys * kBlockRowBytes) +
                        row * kBlockRowBytes + row % 8 * 16;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      uint4 wide[2];
      widen_chunk(codes[i], wide);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (kIsGuarded && (!is_live || (keys.is_scanned && is_bad_chunk(wide[j])))) {
          wide[j] = {};
          is_bad |= is_live;
        }
        if (kIsScaled) wide[j] = multiply(wide[j], scale);
        const int chunk = 2 * i + j;
        store_shared((to ^ chunk % 8 * 16) + chunk / 8 * (kKeys * kBlockRowBytes), wide[j]);
      }
    }
    if (kIsGuarded) {
      const unsigned bad = __ballot_sync(0xFFFFFFFFu, is_bad);
      if (is_first_lane()) notes_.bad_keys[target_.stage][thread_of_warpgroup() / 32] = bad;
    }
    publish_to_async_proxy();
    __syncwarp();
    if (is_first_lane()) arrive(shared_address(&notes_.full[target_.stage]));
    target_.advance();
  }

  // The scale of the row's token, twice as float16.
  __device__ __forceinline__ uint32_t take_scale(int tile) const {
    wait_for(shared_address(&notes_.scales_full[tile % 2]), tile / 2 % 2);
    const uint32_t scale = notes_.scales[tile % 2].v[thread_of_warpgroup() % kKeys];
    arrive(shared_address(&notes_.scales_empty[tile % 2]));
    return scale;
  }

  __device__ __forceinline__ static bool is_first_lane() { return thread_of_warpgroup() % 32 == 0; }

  // Takes the thread's codes out of the next staging slot. The copy engine's permutation is that of operands for rows of 128
  // bytes; for rows of 64 bytes it exchanges chunks by bits of the pair of rows.
  __device__ __forceinline__ void load(uint4 (&codes)[kChunks]) {
    constexpr int kRowBytes = Shape::kBoxRowBytes;
    const int thread = thread_of_warpgroup(), permutation = kRowBytes == 128 ? thread % 8 : thread / 2 % 4;
    wait_for(shared_address(&notes_.staged[source_.stage]), source_.parity);
    const uint32_t from = shared_address(memory_.copy_slot(source_.stage)) + thread * kRowBytes + permutation * 16;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) codes[i] = load_shared(from ^ i * 16);
    __syncwarp();
    if (is_first_lane()) arrive(shared_address(&notes_.unstaged[source_.stage]));
    source_.advance();
  }

  __device__ __forceinline__ static uint4 multiply(const uint4& x, uint32_t scale) {
    return {multiply_float16(x.x, scale), multiply_float16(x.y, scale), multiply_float16(x.z, scale),
            multiply_float16(x.w, scale)};
  }

  __device__ __forceinline__ static bool is_bad_chunk(const uint4& wide) {
    return WidenCodes::kNonFiniteBits != 0 && has_bad_value<false>(wide);
  }

  __device__ __forceinline__ static void widen_chunk(const uint4& codes, uint4 (&wide)[2]) {
    WidenCodes::template widen<ByteOrder::kAdjacent>(codes.x, wide[0].x, wide[0].y);
    WidenCodes::template widen<ByteOrder::kAdjacent>(codes.y, wide[0].z, wide[0].w);
    WidenCodes::template widen<ByteOrder::kAdjacent>(codes.z, wide[1].x, wide[1].y);
    WidenCodes::template widen<ByteOrder::kAdjacent>(codes.w, wide[1].z, wide[1].w);
  }

  static constexpr uint32_t kOne = 0x3C003C00u;

  const HopperMemory<Shape>& memory_;
  HopperNotes<Shape>& notes_;
  bool has_token_scales_;
  RingPlace<Shape::kStagingSlots> source_;
  RingPlace<Shape::kStages> target_;
};

}  // namespace quantattn::cuda
