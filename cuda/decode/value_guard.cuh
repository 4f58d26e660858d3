#pragma once

#include "decode/tile_pipeline.cuh"

// Values that are infinite or NaN, in a tile that not every row sees wholly: a weight of zero does not cancel them, so they
// leave the tile, and the output of rows that do see one becomes NaN.
namespace quantattn::cuda {

template <class VFormat, int kHeadDim>
struct ValueGuard {
  using W = Widen<VFormat>;
  using Layout = TileLayout<kHeadDim * W::kBytes>;

  // Bit k: some value of key k, or its scale, is not finite.
  template <class Stage>
  __device__ __forceinline__ static unsigned find(const Stage& stage, int lane) {
    const int key = lane % kTileTokens;
    bool found = false;
    if constexpr (W::kNonFiniteBits != 0)
#pragma unroll 1
      for (int chunk = lane / kTileTokens; chunk < Layout::kChunks; chunk += 2) {
        const uint4 codes = *reinterpret_cast<const uint4*>(stage.v + Layout::chunk_offset(key, chunk));
        found |= (elements_not_finite(codes.x) | elements_not_finite(codes.y) | elements_not_finite(codes.z) |
                  elements_not_finite(codes.w)) != 0;
      }
    if constexpr (VFormat::kHasScale) found |= !isfinite(stage.v_scale[key]);
    const unsigned lanes = __ballot_sync(0xFFFFFFFFu, found);
    return (lanes | lanes >> kTileTokens) & ((1u << kTileTokens) - 1);
  }

  // Makes all values and scales of the tile finite.
  template <class Stage>
  __device__ __forceinline__ static void clear(const Stage& stage, int lane) {
    const int key = lane % kTileTokens;
    if constexpr (W::kNonFiniteBits != 0)
#pragma unroll 1
      for (int chunk = lane / kTileTokens; chunk < Layout::kChunks; chunk += 2) {
        auto* codes = reinterpret_cast<uint32_t*>(stage.v + Layout::chunk_offset(key, chunk));
        for (int i = 0; i < 4; ++i) codes[i] &= ~elements_not_finite(codes[i]);
      }
    if constexpr (VFormat::kHasScale)
      if (lane < kTileTokens && !isfinite(stage.v_scale[key])) stage.v_scale[key] = 0.f;
  }

 private:
  // All bits of the elements of a word that are not finite.
  __device__ __forceinline__ static uint32_t elements_not_finite(uint32_t word) {
    if constexpr (W::kBytes == 2) {
      constexpr uint32_t kBits = W::kNonFiniteBits * 0x00010001u;
      return __vcmpeq2(word & kBits, kBits);
    } else {
      constexpr uint32_t kBits = W::kNonFiniteBits * 0x01010101u;
      return __vcmpeq4(word & kBits, kBits);
    }
  }
};

}  // namespace quantattn::cuda
