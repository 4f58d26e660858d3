#pragma once

#include "prefill/hopper_shape.cuh"

// The warps that bring the scales of single tokens, one for K's and one for V's. Pages are read two tiles ahead, scales one
// tile.
namespace quantattn::cuda {

// The largest power of two by which any code may be multiplied.
template <class Format>
constexpr float headroom() {
  float factor = 1.f;
  while (2.f * factor * Format::kMaxCode < 65504.f) factor *= 2.f;
  return factor;
}

template <class Shape>
class HopperScales {
  static constexpr int kKeys = Shape::kKeys, kOwnKeys = kKeys / 32;
  static constexpr unsigned kLargestBound = 0x47800000;  // 2^16 as bits: above the largest finite scale
  static constexpr float kHeadroom = headroom<typename Shape::Format>();

 public:
  __device__ __forceinline__ HopperScales(const PrefillTask& task, const HopperMemory<Shape>& memory, bool are_values)
      : task_(task),
        scale_(are_values ? task.v_scale : task.k_scale),
        notes_(memory.notes()),
        rows_(notes_.tile),
        keys_(notes_.keys),
        are_values_(are_values) {}

  __device__ __forceinline__ void run() {
    read_pages(0);
    read_scales();
    read_pages(1);
#pragma unroll 1
    for (int i = 0; i < keys_.num_tiles; ++i) {
      wait_for(shared_address(&notes_.scales_empty[i % 2]), i / 2 % 2 ^ 1);
      if (are_values_)
        store_values(i);
      else
        store_keys(i);
      arrive(shared_address(&notes_.scales_full[i % 2]));
      read_scales();
      read_pages(i + 2);
    }
  }

 private:
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

  // Where the scales of the lane's keys of a tile lie. A page id outside the pool reads as zeros, like its codes.
  __device__ __forceinline__ void read_pages(int tile) {
#pragma unroll
    for (int j = 0; j < kOwnKeys; ++j) {
      const int key = keys_.first_key(tile) + 32 * j + lane();
      const bool is_live = tile < keys_.num_tiles && key >= keys_.live_from && key < keys_.live_to;
      pages_[j] = is_live ? rows_.sequence : -1;
      tokens_[j] = key;
      if (task_.page_table && is_live) {
        const auto column = task_.page_size.quotient(static_cast<unsigned>(key));
        pages_[j] = task_.page_table.at(rows_.sequence, column);
        tokens_[j] = key - static_cast<int>(column * task_.page_size.divisor);
      }
    }
  }

  // Without branches, so that all reads are under way at once.
  __device__ __forceinline__ void read_scales() {
#pragma unroll
    for (int j = 0; j < kOwnKeys; ++j) {
      const bool is_live = pages_[j] >= 0 && pages_[j] < task_.num_pages && has_token_scales(scale_);
      bits_[j] = 0;
      load_if(is_live, static_cast<const uint16_t*>(scale_.data) + scale_.offset(pages_[j], tokens_[j], rows_.kv_head),
              bits_[j]);
    }
  }

  __device__ __forceinline__ float own_scale(int j) const {
    return has_token_scales(scale_) ? __half2float(__ushort_as_half(bits_[j])) : 1.f;
  }

  __device__ __forceinline__ void store_keys(int tile) {
#pragma unroll
    for (int j = 0; j < kOwnKeys; ++j) notes_.scales[tile % 2].k[32 * j + lane()] = own_scale(j);
  }

  __device__ __forceinline__ void store_values(int tile) {
    TokenScales<kKeys>& scales = notes_.scales[tile % 2];
    const bool is_scanned = keys_.is_scanned && keys_.is_guarded(tile);
    float v[kOwnKeys], largest = 0.f;
#pragma unroll
    for (int j = 0; j < kOwnKeys; ++j) {
      v[j] = own_scale(j);
      const bool is_bad = is_scanned && !isfinite(v[j]);
      const unsigned bad = __ballot_sync(0xFFFFFFFFu, is_bad);
      if (lane() == 0) scales.bad_keys[j] = bad;
      if (is_bad) v[j] = 0.f;
      largest = fmaxf(largest, fabsf(v[j]));
    }
    const unsigned old_bits = bound_bits_;
    bound_bits_ = max(bound_bits_, min((__reduce_max_sync(0xFFFFFFFFu, __float_as_uint(largest)) & 0x7F800000u) + 0x00800000u,
                                       kLargestBound));
    const float inverse = __uint_as_float(0x7F000000u - bound_bits_);
#pragma unroll
    for (int j = 0; j < kOwnKeys; ++j) {
      const float relative = v[j] * inverse * kHeadroom;
      scales.v[32 * j + lane()] = pack_float16(relative, relative);
    }
    if (lane() == 0) {
      scales.unit = __uint_as_float(bound_bits_) / kHeadroom;
      scales.rescale = old_bits == bound_bits_ ? 1.f : __uint_as_float(old_bits) * inverse;
    }
  }

  const PrefillTask& task_;
  const ScaleView& scale_;
  HopperNotes<Shape>& notes_;
  const RowTile& rows_;
  const KeyRange<Shape>& keys_;
  bool are_values_;
  int pages_[kOwnKeys], tokens_[kOwnKeys];  // of the tile whose scales are read next
  uint16_t bits_[kOwnKeys];
  unsigned bound_bits_ = 0;  // a power of two above the largest value scale so far, as float bits
};

}  // namespace quantattn::cuda
