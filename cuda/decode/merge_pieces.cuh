#pragma once

#include "decode/rows.cuh"

// Joins pieces of one item in their order, so the result does not depend on which block does it or when.
namespace quantattn::cuda {

// Rows and padded head_dim are the kernel's. Layout: see piece_floats().
template <int kNumRows, int kPaddedHeadDim>
struct Piece {
  static constexpr int kRows = kNumRows, kHeadDim = kPaddedHeadDim, kFloats = piece_floats(kRows, kHeadDim);
  static constexpr int kOwned = kHeadDim / 32;  // channels of a lane, neighbours
  float* data;

  __device__ __forceinline__ float* values(int row, int channel) const { return data + row * kHeadDim + channel; }
  __device__ __forceinline__ float& maximum(int row) const { return data[kRows * kHeadDim + row]; }
  __device__ __forceinline__ float& sum(int row) const { return data[kRows * kHeadDim + kRows + row]; }
};

// One row of an item, spread over a warp.
template <int kOwned>
struct RowSums {
  float values[kOwned] = {};
  float maximum = kNoMaximum, sum = 0.f;
};

__device__ __forceinline__ float warp_max(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
  return x;
}
__device__ __forceinline__ float warp_total(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
  return x;
}

// piece_at(i) is the i-th piece, 0 <= i < num_pieces. Lane i reads the sums of piece i; the values follow, several pieces'
// loads under way at a time.
template <class ItemPiece, class PieceAt>
__device__ __forceinline__ RowSums<ItemPiece::kOwned> merge_row(int num_pieces, PieceAt piece_at, int row, int lane) {
  constexpr int kOwned = ItemPiece::kOwned;
  RowSums<kOwned> merged;
  for (int first = 0; first < num_pieces; first += 32) {
    const int count = min(32, num_pieces - first);
    const ItemPiece own = piece_at(first + min(lane, count - 1));
    const float maximum = own.maximum(row), sum = own.sum(row);
    const float raised = fmaxf(merged.maximum, warp_max(maximum));
    const float weight = lane < count ? exp2_approx(maximum - raised) : 0.f, rescale = exp2_approx(merged.maximum - raised);
    merged.maximum = raised;
    merged.sum = merged.sum * rescale + warp_total(weight * sum);
#pragma unroll
    for (int j = 0; j < kOwned; ++j) merged.values[j] *= rescale;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const float* values = piece_at(first + i).values(row, lane * kOwned);
      const float piece_weight = __shfl_sync(0xFFFFFFFFu, weight, i);
#pragma unroll
      for (int j = 0; j < kOwned; j += 2) {
        const float2 pair = *reinterpret_cast<const float2*>(values + j);
        merged.values[j] += piece_weight * pair.x;
        merged.values[j + 1] += piece_weight * pair.y;
      }
    }
  }
  return merged;
}

// Normalises and stores a row.
template <int kOwned>
__device__ __forceinline__ void write_merged(const DecodeTask& task, const Item& item, const Row& row,
                                             const RowSums<kOwned>& merged, int lane) {
  const DecodeParams& p = task.params;
  if (!row.is_real) return;
  const RowResult result = finish_row(task, row, item.kv_head, merged.maximum, merged.sum);
  with_type(p.q_dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = p.out.template at<T>(item.sequence, row.token, row.head);
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const int channel = lane * kOwned + i;
      if (channel < p.cache.head_dim)
        out[channel] = from_float<T>(result.multiplier == 0.f ? 0.f : merged.values[i] * result.multiplier);
    }
  });
  if (lane == 0 && p.lse != nullptr) p.lse[lse_index(p, item.sequence, row)] = result.lse;
}

}  // namespace quantattn::cuda
