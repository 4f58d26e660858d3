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

template <int kOwned>
__device__ __forceinline__ void read_values(const float* from, float (&values)[kOwned]) {
  if constexpr (kOwned == 2) {
    const float2 pair = *reinterpret_cast<const float2*>(from);
    values[0] = pair.x, values[1] = pair.y;
  } else {
#pragma unroll
    for (int j = 0; j < kOwned; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + j);
      values[j] = four.x, values[j + 1] = four.y, values[j + 2] = four.z, values[j + 3] = four.w;
    }
  }
}

// Joins a row of pieces; address_of(i) is where the i-th lies, 0 <= i < num_pieces. Lane i reads the sums of piece i; the
// values follow, several pieces' reads under way at a time.
template <class ItemPiece, class AddressOf>
__device__ __forceinline__ RowSums<ItemPiece::kOwned> merge_row(int num_pieces, AddressOf address_of, int row, int lane) {
  constexpr int kOwned = ItemPiece::kOwned, kAtOnce = ItemPiece::kRows > 8 ? 4 : 8;
  RowSums<kOwned> merged;
#pragma unroll 1
  for (int first = 0; first < num_pieces; first += 32) {
    const int count = min(32, num_pieces - first);
    float* const address = address_of(first + min(lane, count - 1));
    const ItemPiece own{address};
    const float maximum = own.maximum(row), sum = own.sum(row);
    const float raised = fmaxf(merged.maximum, warp_max(maximum));
    const float weight = lane < count ? exp2_approx(maximum - raised) : 0.f, rescale = exp2_approx(merged.maximum - raised);
    merged.maximum = raised;
    merged.sum = merged.sum * rescale + warp_total(weight * sum);
#pragma unroll
    for (int j = 0; j < kOwned; ++j) merged.values[j] *= rescale;
#pragma unroll 1
    for (int i = 0; i < count; i += kAtOnce) {
      float values[kAtOnce][kOwned];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        // Past the end: the last piece again, with weight zero.
        const auto bits = __shfl_sync(0xFFFFFFFFu, reinterpret_cast<unsigned long long>(address), min(i + k, count - 1));
        read_values(ItemPiece{reinterpret_cast<float*>(bits)}.values(row, lane * kOwned), values[k]);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const float piece_weight = __shfl_sync(0xFFFFFFFFu, weight, i + k);
#pragma unroll
        for (int j = 0; j < kOwned; ++j) merged.values[j] += piece_weight * values[k][j];
      }
    }
  }
  return merged;
}

// Normalises and stores a row.
template <int kOwned>
__device__ __forceinline__ void write_row(const DecodeTask& task, const Item& item, const Row& row,
                                          const RowSums<kOwned>& merged, float v_scale, float sink, int lane) {
  const DecodeParams& p = task.params;
  const RowResult result = finish_row(task, v_scale, sink, merged.maximum, merged.sum);
  const int64_t offset = p.out.offset(item.sequence, row.token, row.head);
#pragma unroll
  for (int i = 0; i < kOwned; ++i) {
    const int channel = lane * kOwned + i;
    if (channel < p.cache.head_dim)
      store_element(p.out.data, offset + channel, p.q_dtype,
                    result.multiplier == 0.f ? 0.f : merged.values[i] * result.multiplier);
  }
  if (lane == 0 && p.lse != nullptr) p.lse[lse_index(p, item.sequence, row)] = result.lse;
}

}  // namespace quantattn::cuda
