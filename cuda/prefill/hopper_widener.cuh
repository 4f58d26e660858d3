#pragma once

#include "prefill/hopper_guard.cuh"

// The warpgroup that turns copied tiles of 8-bit codes into 16-bit operands, a row by each thread. On the way it does what
// HopperGuard does for tiles of 16 bits.
namespace quantattn::cuda {

template <class Shape>
class HopperWidener {
  using WidenCodes = Widen<typename Shape::Format>;
  static constexpr int kKeys = Shape::kKeys, kChunks = Shape::kHeadDim / 16;  // 16 codes each
  static_assert(kKeys == kWarpgroupThreads && !WidenCodes::kIsBf16 && WidenCodes::kFactor == 1.f);

 public:
  __device__ __forceinline__ explicit HopperWidener(const HopperMemory<Shape>& memory)
      : memory_(memory), notes_(memory.notes()), row_(thread_of_warpgroup()) {}

  __device__ __forceinline__ void run() {
    const int num_tiles = notes_.keys.num_tiles;
#pragma unroll 1
    for (int step = 0; step < 2 * num_tiles; ++step) {
      const bool is_last = step + 1 == 2 * num_tiles, is_value = is_last || (step > 0 && step % 2 == 0);
      const int tile = is_last ? num_tiles - 1 : step / 2 - 1;  // of a value
      if (is_value && notes_.keys.is_guarded(tile))
        widen<true>(notes_.keys.first_key(tile));
      else
        widen<false>(0);
    }
  }

 private:
  // In a guarded tile, rows that were not brought become zeros; so do values that are not finite where they are looked for.
  template <bool kIsGuarded>
  __device__ __forceinline__ void widen(int first_key) {
    uint4 codes[kChunks];
    load(codes);
    wait_for(shared_address(&notes_.empty[target_.stage]), target_.parity ^ 1);
    const KeyRange<Shape>& keys = notes_.keys;
    const bool is_live = first_key + row_ >= keys.live_from && first_key + row_ < keys.live_to;
    bool is_bad = false;
    const uint32_t to = shared_address(memory_.stage(target_.stage)) + row_ * kBlockRowBytes + row_ % 8 * 16;
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
        const int chunk = 2 * i + j;
        store_shared((to ^ chunk % 8 * 16) + chunk / 8 * (kKeys * kBlockRowBytes), wide[j]);
      }
    }
    if (kIsGuarded) {
      const unsigned bad = __ballot_sync(0xFFFFFFFFu, is_bad);
      if (row_ % 32 == 0) notes_.bad_keys[target_.stage][row_ / 32] = bad;
    }
    publish_to_async_proxy();
    __syncwarp();
    if (row_ % 32 == 0) arrive(shared_address(&notes_.full[target_.stage]));
    target_.advance();
  }

  // Takes the row out of the next staging slot. The copy engine's permutation is that of operands for rows of 128 bytes; for
  // rows of 64 bytes it exchanges chunks by bits of the pair of rows.
  __device__ __forceinline__ void load(uint4 (&codes)[kChunks]) {
    constexpr int kRowBytes = Shape::kBoxRowBytes;
    const int permutation = kRowBytes == 128 ? row_ % 8 : row_ / 2 % 4;
    wait_for(shared_address(&notes_.staged[source_.stage]), source_.parity);
    const uint32_t from = shared_address(memory_.copy_slot(source_.stage)) + row_ * kRowBytes + permutation * 16;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) codes[i] = load_shared(from ^ i * 16);
    __syncwarp();
    if (row_ % 32 == 0) arrive(shared_address(&notes_.unstaged[source_.stage]));
    source_.advance();
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

  const HopperMemory<Shape>& memory_;
  HopperNotes<Shape>& notes_;
  int row_;
  RingPlace<Shape::kStagingSlots> source_;
  RingPlace<Shape::kStages> target_;
};

}  // namespace quantattn::cuda
