#pragma once

#include "decode/ptx.cuh"
#include "decode/schedule.cuh"
#include "decode/widen.cuh"
#include "formats/float_bits.h"

// Brings tiles of K and V from global to shared memory. A warp owns its ring of stages and its copies, so the loop over
// tiles has no barrier wider than a warp, and copies run ahead across the ends of items.
namespace quantattn::cuda {

// One tile of K or V in shared memory: kTileTokens rows of kRowBytes in 16-byte chunks, permuted so that eight rows of one
// chunk lie in different banks.
template <int kRowBytes>
struct TileLayout {
  static_assert(kRowBytes % 64 == 0);
  static constexpr int kBytes = kTileTokens * kRowBytes;

  __device__ __forceinline__ static int chunk_offset(int row, int chunk) {
    const int permuted = kRowBytes >= 128 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
    return row * kRowBytes + permuted * 16;
  }
  __device__ __forceinline__ static int byte_offset(int row, int byte) { return chunk_offset(row, byte / 16) + byte % 16; }
};

// Walks over the tiles of consecutive items.
struct TileCursor {
  Item item;
  SequenceSpan span;
  int tile;  // within the item

  __device__ __forceinline__ void seek(const DecodeTask& task, const Item& first, int64_t tile_number) {
    item = first;
    span = span_of(task, item.sequence);
    while (tile_number >= item.first_tile + item.num_tiles) next_item(task);
    tile = static_cast<int>(tile_number - item.first_tile);
  }
  __device__ __forceinline__ void advance(const DecodeTask& task) {
    if (++tile < item.num_tiles) return;
    next_item(task);
    tile = 0;
  }
  __device__ __forceinline__ int first_token() const { return (span.first_tile + tile) * kTileTokens; }

 private:
  __device__ __forceinline__ void next_item(const DecodeTask& task) {
    item.first_tile += item.num_tiles;
    if (++item.row_tile < task.num_row_tiles) return;
    item.row_tile = 0;
    if (++item.kv_head < task.params.cache.num_kv_heads) return;
    item.kv_head = 0;
    if (++item.sequence == task.params.batch_size) return;
    span = span_of(task, item.sequence);
    item.num_tiles = span.num_tiles;
  }
};

// Copies a tile. Lane r holds the byte offset of row r % 16 from `data`; dead rows and the padding of live ones become zeros,
// and nothing of them is read. kCopyBytes 0 serves any alignment, one element at a time.
template <int kRowBytes, int kElementBytes, int kCopyBytes>
__device__ __forceinline__ void copy_tile(char* tile, const char* data, int64_t row_offset, unsigned live_rows, int row_bytes,
                                          int lane) {
  constexpr int kStep = kCopyBytes == 0 ? kElementBytes : kCopyBytes, kPerRow = kRowBytes / kStep;
  const auto copy_one = [&](int index) {
    const int row = index / kPerRow, byte = index % kPerRow * kStep;
    const char* source = data + __shfl_sync(0xFFFFFFFFu, row_offset, row) + byte;
    const bool is_live = (live_rows >> row & 1u) != 0 && byte < row_bytes;
    char* destination = tile + TileLayout<kRowBytes>::byte_offset(row, byte);
    if constexpr (kCopyBytes != 0)
      copy_async<kCopyBytes>(shared_address(destination), is_live ? source : data, is_live);
    else if constexpr (kElementBytes == 1)
      *destination = is_live ? *source : 0;
    else
      *reinterpret_cast<uint16_t*>(destination) = is_live ? *reinterpret_cast<const uint16_t*>(source) : uint16_t{0};
  };
  if constexpr (kCopyBytes == 16) {
#pragma unroll
    for (int i = 0; i < kTileTokens * kPerRow / 32; ++i) copy_one(i * 32 + lane);
  } else {
#pragma unroll 1
    for (int i = 0; i < kTileTokens * kPerRow / 32; ++i) copy_one(i * 32 + lane);
  }
}

template <int kRowBytes, int kElementBytes>
__device__ __forceinline__ void copy_tile(int copy_bytes, char* tile, const void* data, int64_t row_offset, unsigned live_rows,
                                          int row_bytes, int lane) {
  const char* bytes = static_cast<const char*>(data);
  if (copy_bytes == 16)
    copy_tile<kRowBytes, kElementBytes, 16>(tile, bytes, row_offset, live_rows, row_bytes, lane);
  else if (copy_bytes == 8)
    copy_tile<kRowBytes, kElementBytes, 8>(tile, bytes, row_offset, live_rows, row_bytes, lane);
  else
    copy_tile<kRowBytes, kElementBytes, 0>(tile, bytes, row_offset, live_rows, row_bytes, lane);
}

// The scale of one vector: the cache's own where it has one for each token, else 1 (a static scale is applied later).
__device__ __forceinline__ float token_scale(const ScaleView& scale, int64_t page, int64_t token, int head, bool is_live) {
  if (scale.granularity != ScaleGranularity::kTokenHead) return 1.f;
  if (!is_live) return 0.f;
  return formats::float_of_half(static_cast<const uint16_t*>(scale.data)[scale.offset(page, token, head)]);
}

template <class KFormat, class VFormat, int kHeadDim, int kStages>
class TilePipeline {
 public:
  using KLayout = TileLayout<kHeadDim * Widen<KFormat>::kBytes>;
  using VLayout = TileLayout<kHeadDim * Widen<VFormat>::kBytes>;
  static constexpr bool kHasScales = KFormat::kHasScale || VFormat::kHasScale;
  static constexpr int kScaleBytes = kHasScales ? 2 * kTileTokens * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kStageBytes = KLayout::kBytes + VLayout::kBytes + kScaleBytes;
  static constexpr int kBytes = kStages * kStageBytes;

  struct Stage {
    char *k, *v;
    float *k_scale, *v_scale;  // [kTileTokens]
  };

  __device__ __forceinline__ TilePipeline(const DecodeTask& task, char* memory, int lane)
      : task_(task), memory_(memory), lane_(lane) {}

  // Starts the copies of the first kStages - 1 tiles of the `num_tiles` at `cursor`.
  __device__ __forceinline__ void start(const TileCursor& cursor, int num_tiles) {
    cursor_ = cursor;
    remaining_ = num_tiles;
    fetch_page();
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) copy_next();
  }

  // Waits for the oldest tile and starts another copy into the stage read before it.
  __device__ __forceinline__ Stage next() {
    store_scale();
    wait_copies<kStages - 2>();
    __syncwarp();
    const Stage ready = stage(read_index_);
    read_index_ = read_index_ + 1 == kStages ? 0 : read_index_ + 1;
    copy_next();
    return ready;
  }

 private:
  __device__ __forceinline__ Stage stage(int index) const {
    char* base = memory_ + index * kStageBytes;
    float* scales = reinterpret_cast<float*>(base + KLayout::kBytes + VLayout::kBytes);
    return {base, base + KLayout::kBytes, scales, scales + kTileTokens};
  }

  // The page of this lane's token is loaded one tile early, so that its latency hides behind a tile's arithmetic.
  __device__ __forceinline__ void fetch_page() {
    const int token = cursor_.first_token() + lane_ % kTileTokens;
    is_live_ = remaining_ > 0 && token >= cursor_.span.first_key && token < cursor_.span.end_key;
    const unsigned page_index = task_.page_size.quotient(static_cast<unsigned>(token));
    offset_in_page_ = token - static_cast<int>(page_index * task_.page_size.divisor);
    page_ = cursor_.item.sequence;
    if (task_.params.page_table && is_live_) page_ = task_.params.page_table.at(cursor_.item.sequence, page_index);
  }

  // Always commits a group, so that the count of groups still to wait for is a constant.
  __device__ __forceinline__ void copy_next() {
    if (remaining_ > 0) {
      store_scale();
      copy_tiles(stage(write_index_));
      scale_index_ = write_index_;
      write_index_ = write_index_ + 1 == kStages ? 0 : write_index_ + 1;
      if (--remaining_ > 0) cursor_.advance(task_);
      fetch_page();
    }
    commit_copies();
  }

  __device__ __forceinline__ void copy_tiles(const Stage& to) {
    const KvCacheView& cache = task_.params.cache;
    // A page id outside the pool reads as zeros.
    is_live_ = is_live_ && page_ >= 0 && page_ < cache.num_pages;
    const unsigned live_rows = __ballot_sync(0xFFFFFFFFu, is_live_);
    const int64_t page = is_live_ ? page_ : 0;
    const int head = cursor_.item.kv_head;
    copy_tile<kHeadDim * Widen<KFormat>::kBytes, Widen<KFormat>::kBytes>(
        task_.k_copy_bytes, to.k, cache.k_codes.data, cache.k_codes.offset(page, offset_in_page_, head) * Widen<KFormat>::kBytes,
        live_rows, cache.head_dim * Widen<KFormat>::kBytes, lane_);
    copy_tile<kHeadDim * Widen<VFormat>::kBytes, Widen<VFormat>::kBytes>(
        task_.v_copy_bytes, to.v, cache.v_codes.data, cache.v_codes.offset(page, offset_in_page_, head) * Widen<VFormat>::kBytes,
        live_rows, cache.head_dim * Widen<VFormat>::kBytes, lane_);
    if constexpr (kHasScales) {
      const bool is_k = lane_ < kTileTokens;
      scale_ = token_scale(is_k ? cache.k_scale : cache.v_scale, page, offset_in_page_, head, is_live_);
    }
  }

  // The scale loaded with a tile's copies reaches shared memory one tile later, again to hide its latency.
  __device__ __forceinline__ void store_scale() {
    if constexpr (kHasScales)
      if (scale_index_ >= 0) stage(scale_index_).k_scale[lane_] = scale_;
    scale_index_ = -1;
  }

  const DecodeTask& task_;
  char* memory_;
  int lane_;
  TileCursor cursor_;
  int remaining_ = 0, read_index_ = 0, write_index_ = 0;
  int page_ = 0, offset_in_page_ = 0;  // of this lane's token in the tile to be copied next
  bool is_live_ = false;
  float scale_ = 1.f;
  int scale_index_ = -1;
};

}  // namespace quantattn::cuda
