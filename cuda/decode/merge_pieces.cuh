#pragma once

#include "decode/rows.cuh"

// Joins pieces of one item in their order, so the result does not depend on which block does it or when.
namespace quantattn::cuda {

// Rows and padded head_dim are the kernel's. Layout: see piece_floats().
template <int kRows, int kHeadDim>
struct Piece {
  static constexpr int kFloats = piece_floats(kRows, kHeadDim);
  float* data;

  __device__ __forceinline__ float& value(int row, int channel) const { return data[row * kHeadDim + channel]; }
  __device__ __forceinline__ float4& values(int row, int channel) const {
    return *reinterpret_cast<float4*>(data + row * kHeadDim + channel);
  }
  __device__ __forceinline__ float& maximum(int row) const { return data[kRows * kHeadDim + row]; }
  __device__ __forceinline__ float& sum(int row) const { return data[kRows * kHeadDim + kRows + row]; }
};

struct MergedValues {
  float4 values;  // of four neighbouring channels
  float maximum, sum;
};

// piece_at(i) is the i-th piece, 0 <= i < num_pieces.
template <class PieceAt>
__device__ __forceinline__ MergedValues merge_values(int num_pieces, PieceAt piece_at, int row, int channel) {
  MergedValues merged = {{0.f, 0.f, 0.f, 0.f}, kNoMaximum, 0.f};
#pragma unroll 4
  for (int i = 0; i < num_pieces; ++i) merged.maximum = fmaxf(merged.maximum, piece_at(i).maximum(row));
#pragma unroll 4
  for (int i = 0; i < num_pieces; ++i) {
    const auto piece = piece_at(i);
    const float weight = exp2_approx(piece.maximum(row) - merged.maximum);
    const float4 values = piece.values(row, channel);
    merged.values.x += weight * values.x, merged.values.y += weight * values.y;
    merged.values.z += weight * values.z, merged.values.w += weight * values.w;
    merged.sum += weight * piece.sum(row);
  }
  return merged;
}

// Normalises and stores four channels of a row; the first channel's owner stores the log-sum-exp.
__device__ __forceinline__ void write_merged(const DecodeTask& task, const Item& item, const Row& row, int channel,
                                             const MergedValues& merged) {
  const DecodeParams& p = task.params;
  if (!row.is_real) return;
  const RowResult result = finish_row(task, row, item.kv_head, merged.maximum, merged.sum);
  const int64_t offset = p.out.offset(item.sequence, row.token, row.head);
  const float values[4] = {merged.values.x, merged.values.y, merged.values.z, merged.values.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (channel + i < p.cache.head_dim)
      store_element(p.out.data, offset + channel + i, p.q_dtype, result.multiplier == 0.f ? 0.f : values[i] * result.multiplier);
  if (channel == 0 && p.lse != nullptr) p.lse[lse_index(p, item.sequence, row)] = result.lse;
}

}  // namespace quantattn::cuda
