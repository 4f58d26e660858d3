#pragma once

#include "decode/rows.cuh"

// Joins pieces of one item in a fixed order, so the result does not depend on which block does it or when.
namespace quantattn::cuda {

// Rows and padded head_dim are the kernel's. Layout: see piece_floats().
template <int kNumRows, int kPaddedHeadDim>
struct Piece {
  static constexpr int kRows = kNumRows, kHeadDim = kPaddedHeadDim, kFloats = piece_floats(kRows, kHeadDim);
  static constexpr int kQuads = kHeadDim / 4;  // of a row: four neighbouring channels are read at once
  float* data;

  __device__ __forceinline__ float* values(int row, int channel) const { return data + row * kHeadDim + channel; }
  __device__ __forceinline__ float4& quad(int row, int index) const {
    return *reinterpret_cast<float4*>(values(row, 4 * index));
  }
  __device__ __forceinline__ float& maximum(int row) const { return data[kRows * kHeadDim + row]; }
  __device__ __forceinline__ float& sum(int row) const { return data[kRows * kHeadDim + kRows + row]; }
};

__device__ __forceinline__ void scale_quad(float4& x, float factor) {
  x.x *= factor, x.y *= factor, x.z *= factor, x.w *= factor;
}

// The sums of a row, and four of its channels.
struct RowSums {
  float4 values = {0.f, 0.f, 0.f, 0.f};
  float maximum = kNoMaximum, sum = 0.f;

  // Lets the sums refer to another maximum.
  __device__ __forceinline__ void raise(float raised) {
    const float rescale = exp2_approx(maximum - raised);
    maximum = raised;
    sum *= rescale;
    scale_quad(values, rescale);
  }
};

// How warps share out the joining of rows. A warp takes a part of a row: the lanes of a group a quad each, and the groups the
// pieces in turn. Few rows are cut into more parts, so that all warps have one.
template <class ItemPiece>
struct MergeTeam {
  static constexpr int kQuadsLog2 = ItemPiece::kQuads == 16 ? 4 : ItemPiece::kQuads == 32 ? 5 : 6;
  static_assert(ItemPiece::kQuads == 1 << kQuadsLog2);
  int lanes_log2;  // of a group

  __device__ __forceinline__ MergeTeam(int num_pieces, int num_rows, int num_warps) : lanes_log2(min(kQuadsLog2, 5)) {
    while (lanes_log2 > 3 && 64 >> lanes_log2 <= num_pieces && num_rows << parts_log2() < num_warps) --lanes_log2;
  }
  __device__ __forceinline__ int parts_log2() const { return kQuadsLog2 - lanes_log2; }  // parts of a row
  __device__ __forceinline__ int group_lanes() const { return 1 << lanes_log2; }
};

// Pieces of one column in their order: at equal distances, but for one that may lie elsewhere.
struct PieceList {
  int count;
  const float* base;
  unsigned distance;  // floats
  int exception;      // index of the one elsewhere, or -1
  const float* elsewhere;

  __device__ __forceinline__ float* at(int i) const {
    const float* regular = base + uint64_t{static_cast<unsigned>(i)} * distance;
    return const_cast<float*>(i == exception ? elsewhere : regular);
  }
};

// Joins a part of a row of pieces. Every lane finds the weights of its pieces for itself: to share them out would take a
// second round of reads, and half of the time of a join is the latency of its reads.
template <class ItemPiece>
__device__ __forceinline__ RowSums merge_row(const MergeTeam<ItemPiece>& team, const PieceList& pieces, int row, int quad,
                                             int lane) {
  constexpr int kAtOnce = 4;  // pieces whose reads are under way at a time
  const int num_groups = 32 >> team.lanes_log2;
  RowSums merged;
#pragma unroll 1
  for (int first = lane >> team.lanes_log2; first < pieces.count; first += kAtOnce * num_groups) {
    float4 values[kAtOnce];
    float maxima[kAtOnce], sums[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {  // past the end: the last piece again, with weight zero
      const ItemPiece piece{pieces.at(min(first + k * num_groups, pieces.count - 1))};
      values[k] = piece.quad(row, quad), maxima[k] = piece.maximum(row), sums[k] = piece.sum(row);
    }
    float raised = merged.maximum;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) raised = fmaxf(raised, maxima[k]);
    merged.raise(raised);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const float weight = first + k * num_groups < pieces.count ? exp2_approx(maxima[k] - raised) : 0.f;
      merged.sum += weight * sums[k];
      merged.values.x += weight * values[k].x, merged.values.y += weight * values[k].y;
      merged.values.z += weight * values[k].z, merged.values.w += weight * values[k].w;
    }
  }
#pragma unroll 1
  for (int distance = team.group_lanes(); distance < 32; distance *= 2) {
    merged.raise(fmaxf(merged.maximum, __shfl_xor_sync(0xFFFFFFFFu, merged.maximum, distance)));
    merged.sum += __shfl_xor_sync(0xFFFFFFFFu, merged.sum, distance);
    merged.values.x += __shfl_xor_sync(0xFFFFFFFFu, merged.values.x, distance);
    merged.values.y += __shfl_xor_sync(0xFFFFFFFFu, merged.values.y, distance);
    merged.values.z += __shfl_xor_sync(0xFFFFFFFFu, merged.values.z, distance);
    merged.values.w += __shfl_xor_sync(0xFFFFFFFFu, merged.values.w, distance);
  }
  return merged;
}

__device__ __forceinline__ void store_quad(const auto& task, int64_t index, const float4& x) {
  const DecodeParams& p = task.params;
  const bool is_half = p.q_dtype == DType::kFloat16;
  const uint2 narrow = {is_half ? pack_float16(x.x, x.y) : pack_bfloat16(x.x, x.y),
                        is_half ? pack_float16(x.z, x.w) : pack_bfloat16(x.z, x.w)};
  if (p.q_dtype == DType::kFloat32) {
    float* to = static_cast<float*>(p.out.data) + index;
    if (task.can_store_quads)
      *reinterpret_cast<float4*>(to) = x;
    else
      to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else {
    uint16_t* to = static_cast<uint16_t*>(p.out.data) + index;
    if (task.can_store_quads)
      *reinterpret_cast<uint2*>(to) = narrow;
    else
      for (int i = 0; i < 4; ++i) to[i] = static_cast<uint16_t>((i < 2 ? narrow.x : narrow.y) >> i % 2 * 16);
  }
}

// Normalises a row's sums and stores the channels at hand.
__device__ __forceinline__ void write_row(const auto& task, const Item& item, const Row& row, RowSums merged, int quad) {
  const DecodeParams& p = task.params;
  if (4 * quad >= p.cache.head_dim) return;
  const RowResult result = finish_row(p, row, merged.maximum, merged.sum);
  scale_quad(merged.values, result.multiplier);
  store_quad(task, p.out.offset(item.sequence, row.token, row.head) + 4 * quad, merged.values);
  if (quad == 0 && p.lse != nullptr) p.lse[lse_index(p, item.sequence, row)] = result.lse();
}

}  // namespace quantattn::cuda
