#pragma once

#include "decode/ptx.cuh"
#include "decode/rows.cuh"
#include "decode/sequences.cuh"
#include "decode/widen.cuh"

// Brings tiles of K and V from global to shared memory. A warp owns its ring of stages and its copies, so the loop over
// tiles has no barrier wider than a warp, and copies run ahead across the ends of items.
namespace quantattn::cuda {

// One tile of K or V in shared memory: kTileTokens rows of kRowBytes in 16-byte chunks, permuted so that eight rows of one
// chunk lie in different banks.
template <int kRowBytes>
struct TileLayout {
  static_assert(kRowBytes % 64 == 0 && kRowBytes <= 512);
  static constexpr int kBytes = kTileTokens * kRowBytes, kChunks = kRowBytes / 16;

  __device__ __forceinline__ static constexpr int swizzle(int row) { return kRowBytes >= 128 ? row & 7 : row >> 1 & 3; }
  __device__ __forceinline__ static int chunk_offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ swizzle(row)) * 16;
  }
  // From the address of a chunk to that of the one `rows` and `chunks` on, constants that have no bit in common with its own
  // row and chunk: it takes no register from the loop over tiles. Tiles lie at multiples of 128 bytes.
  __device__ __forceinline__ static uint32_t further(uint32_t address, int rows, int chunks) {
    return (address ^ static_cast<uint32_t>((swizzle(rows) ^ (chunks & 7)) * 16)) +
           static_cast<uint32_t>(rows * kRowBytes + (chunks & ~7) * 16);
  }
  __device__ __forceinline__ static int byte_offset(int row, int byte) { return chunk_offset(row, byte / 16) + byte % 16; }
};

// Walks over the tiles of consecutive items.
struct TileCursor {
  Item item;
  SequenceSpan span;
  int tile;  // within the item

  __device__ __forceinline__ TileCursor(const Item& first, const SequenceSpan& first_span, unsigned tile_number)
      : item(first), span(first_span), tile(static_cast<int>(tile_number - first.first_tile)) {}

  __device__ __forceinline__ void advance(const auto& task) {
    if (++tile < item.num_tiles) return;
    tile = 0;
    item.first_tile += static_cast<unsigned>(item.num_tiles);
    if (++item.index == items_of(task, item.sequence)) {
      item.index = 0;
      do
        if (++item.sequence == task.params.batch_size) return;
      while (items_of(task, item.sequence) == 0);
      span = span_of(task, item.sequence);
      item.num_tiles = span.num_tiles;
    }
    item.set_column(task, own_column(task));
  }
  __device__ __forceinline__ int first_token() const { return (span.first_tile + tile) * kTileTokens; }
};

// Where the rows of a tile lie in the cache. Lane r stands for row r % kTileTokens.
struct TileSource {
  int64_t page;
  int first_in_page;  // place of the tile's first token in the page; meaningful where the tile lies in one page
  int own_in_page;    // place of this lane's token in its page
  int kv_head;
  unsigned live_rows;  // bit r: row r may be read
};

// Copies a tile; rows that are not live, and the padding of the others, become zeros and are not read. Here the tile lies in
// one page and rows can be copied in 16-byte chunks.
template <int kRowBytes>
__device__ __forceinline__ void copy_page_tile(const CodeAddresses& codes, char* tile, const TileSource& source, int lane) {
  using Layout = TileLayout<kRowBytes>;
  constexpr int kChunks = Layout::kChunks, kRowsPerStep = 32 / kChunks;
  const int row = lane / kChunks, chunk = lane % kChunks;
  const char* from = codes.data + (source.page * codes.page_bytes + (source.first_in_page + row) * codes.token_bytes +
                                   source.kv_head * codes.head_bytes + chunk * 16);
  const unsigned live = chunk * 16 < codes.row_bytes ? source.live_rows >> row : 0;
  const uint32_t to = shared_address(tile) + static_cast<uint32_t>(Layout::chunk_offset(row, chunk));
#pragma unroll
  for (int i = 0; i < kTileTokens / kRowsPerStep; ++i) {
    const bool is_live = (live >> (i * kRowsPerStep) & 1u) != 0;
    copy_async<16>(Layout::further(to, i * kRowsPerStep, 0), from + i * kRowsPerStep * codes.token_bytes, is_live);
  }
}

// Rows in any pages and of any alignment.
template <int kRowBytes, int kElementBytes>
__device__ __forceinline__ void copy_scattered_tile(const CodeAddresses& codes, char* tile, const TileSource& source,
                                                    int lane) {
  const int64_t own_offset =
      source.page * codes.page_bytes + source.own_in_page * codes.token_bytes + source.kv_head * codes.head_bytes;
  const int step = codes.copy_bytes == 0 ? kElementBytes : codes.copy_bytes, per_row = kRowBytes / step;
#pragma unroll 1
  for (int i = lane; i < kTileTokens * per_row; i += 32) {
    const int row = i / per_row, byte = (i - row * per_row) * step;
    const char* from = codes.data + __shfl_sync(0xFFFFFFFFu, own_offset, row) + byte;
    const bool is_live = (source.live_rows >> row & 1u) != 0 && byte < codes.row_bytes;
    char* to = tile + TileLayout<kRowBytes>::byte_offset(row, byte);
    if (step == 16)
      copy_async<16>(shared_address(to), from, is_live);
    else if (step == 8)
      copy_async<8>(shared_address(to), from, is_live);
    else if constexpr (kElementBytes == 1)
      *to = is_live ? *from : 0;
    else
      *reinterpret_cast<uint16_t*>(to) = is_live ? *reinterpret_cast<const uint16_t*>(from) : uint16_t{0};
  }
}

// The scale of one vector as float16 bits: the cache's own where it has one for each token, else 1 (a static scale is applied
// elsewhere).
__device__ __forceinline__ uint16_t token_scale(const ScaleView& scale, const TileSource& source, bool is_live) {
  if (scale.granularity != ScaleGranularity::kTokenHead) return 0x3C00;
  const int64_t index = scale.offset(source.page, source.own_in_page, source.kv_head);
  return is_live ? static_cast<const uint16_t*>(scale.data)[index] : uint16_t{0};
}

// The query rows of an item as they come with its first tile: [kRows, kPitch] 16-bit, padding zero. Behind the channels of a
// row lies what else belongs to it.
template <int kNumRows, int kHeadDim>
struct QueryRows {
  static constexpr int kRows = kNumRows, kPitch = kHeadDim + 16;  // elements; eight rows start in different banks
  static constexpr int kBytes = kRows * kPitch * 2;
  uint16_t* data;

  __device__ __forceinline__ uint16_t* at(int row, int channel) const { return data + row * kPitch + channel; }
  __device__ __forceinline__ RowInputs* inputs(int row) const { return reinterpret_cast<RowInputs*>(at(row, kHeadDim)); }
};

// What is known of an item whose tiles come: what its reader needs again is here and not in its registers.
struct ItemNote {
  Item item;
  SequenceSpan span;
  int first_token;  // of the first tile that comes
};

// Two stages: one tile is read while the next one comes; two buffers of query rows likewise.
template <class Task, class KFormat, class VFormat, int kHeadDim, int kRows>
class TilePipeline {
  static constexpr int kKBytes = Widen<KFormat>::kBytes, kVBytes = Widen<VFormat>::kBytes;

 public:
  using KLayout = TileLayout<kHeadDim * kKBytes>;
  using VLayout = TileLayout<kHeadDim * kVBytes>;
  static constexpr int kStages = 2;
  static constexpr bool kHasScales = KFormat::kHasScale || VFormat::kHasScale;
  static constexpr int kScaleBytes = kHasScales ? 2 * kTileTokens * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kStageBytes = KLayout::kBytes + VLayout::kBytes + kScaleBytes;
  using Query = QueryRows<kRows, kHeadDim>;
  static constexpr int kBytes = kStages * kStageBytes + 2 * Query::kBytes;

  struct Stage {
    char *k, *v;
    float *k_scale, *v_scale;  // [kTileTokens]
  };

  // The scales that a stage holds where no token has its own.
  __device__ __forceinline__ static void set_unit_scales(const Stage& stage, int lane) {
    if constexpr (kHasScales) stage.k_scale[lane] = 1.f;
  }

  // Will bring the `num_tiles` tiles from `cursor` on.
  __device__ __forceinline__ TilePipeline(const Task& task, const TileCursor& cursor, int num_tiles, char* memory,
                                          ItemNote* notes, int lane)
      : task_(task), memory_(memory), notes_(notes), lane_(lane), cursor_(cursor), remaining_(num_tiles) {
    set_unit_scales(stage(0), lane);
    set_unit_scales(stage(1), lane);
    fetch_page();
  }

  // Waits for the tile under way; call copy_next() before reading it, so that the next one is under way.
  __device__ __forceinline__ Stage wait() {
    store_scale();
    wait_copies<0>();
    __syncwarp();
    return stage(1 - write_index_);
  }

  // The rows of the item whose first tile has arrived; call this before copy_next(). The rows stay until the next item's.
  __device__ __forceinline__ Query query() const { return query_rows(1 - query_index_); }
  __device__ __forceinline__ const ItemNote* item() const { return notes_ + (1 - query_index_); }

  // Before copy_next(): the tile that was waited for is the last.
  __device__ __forceinline__ bool has_last() const { return remaining_ == 0; }

  // Starts the copy of the next tile, if there is one.
  __device__ __forceinline__ void copy_next() {
    if (remaining_ == 0) return;
    const Stage to = stage(write_index_);
    const TileSource source = tile_source();
    if (task_.is_tile_in_page && min(task_.k.copy_bytes, task_.v.copy_bytes) == 16) {
      copy_page_tile<kHeadDim * kKBytes>(task_.k, to.k, source, lane_);
      copy_page_tile<kHeadDim * kVBytes>(task_.v, to.v, source, lane_);
    } else {
      copy_scattered_tile<kHeadDim * kKBytes, kKBytes>(task_.k, to.k, source, lane_);
      copy_scattered_tile<kHeadDim * kVBytes, kVBytes>(task_.v, to.v, source, lane_);
    }
    if (is_new_item_) copy_query();  // behind the codes, which take longer to come
    commit_copies();
    if (kHasScales && task_.has_token_scales) {
      const KvCacheView& cache = task_.params.cache;
      const bool is_live = source.live_rows >> lane_ % kTileTokens & 1u;
      scale_bits_ = token_scale(lane_ < kTileTokens ? cache.k_scale : cache.v_scale, source, is_live);
    }
    write_index_ = 1 - write_index_;
    if (--remaining_ == 0) return;
    cursor_.advance(task_);
    is_new_item_ = cursor_.tile == 0;
    fetch_page();
  }

 private:
  __device__ __forceinline__ Stage stage(int index) const {
    char* base = memory_ + index * kStageBytes;
    float* scales = reinterpret_cast<float*>(base + KLayout::kBytes + VLayout::kBytes);
    return {base, base + KLayout::kBytes, scales, scales + kTileTokens};
  }

  // The page of this lane's token is loaded one tile early, so that its latency hides behind a tile's arithmetic.
  __device__ __forceinline__ void fetch_page() {
    const int first = cursor_.first_token(), token = first + lane_ % kTileTokens;
    const SequenceSpan& span = cursor_.span;
    is_live_ = remaining_ > 0 && token >= span.first_key && token < span.end_key;
    const unsigned page_index = task_.page_size.quotient(static_cast<unsigned>(task_.is_tile_in_page ? first : token));
    in_page_ = token - static_cast<int>(page_index * task_.page_size.divisor);
    page_ = cursor_.item.sequence;
    const bool is_tile_live = remaining_ > 0 && first < span.end_key && first + kTileTokens > span.first_key;
    const auto& table = task_.params.page_table;
    if (table) load_if(task_.is_tile_in_page ? is_tile_live : is_live_, &table.at(cursor_.item.sequence, page_index), page_);
  }

  // A page id outside the pool reads as zeros.
  __device__ __forceinline__ TileSource tile_source() const {
    const bool is_live = is_live_ && page_ >= 0 && page_ < task_.params.cache.num_pages;
    return {page_, in_page_ & -kTileTokens, in_page_, cursor_.item.kv_head, __ballot_sync(0xFFFFFFFFu, is_live)};
  }

  // The scale loaded with a tile's copies reaches shared memory when the tile is waited for.
  __device__ __forceinline__ void store_scale() {
    if (kHasScales && task_.has_token_scales)
      stage(1 - write_index_).k_scale[lane_] = __half2float(__ushort_as_half(scale_bits_));
  }

  __device__ __forceinline__ Query query_rows(int index) const {
    return {reinterpret_cast<uint16_t*>(memory_ + kStages * kStageBytes + index * Query::kBytes)};
  }

  __device__ __forceinline__ void copy_query() {
    constexpr int kChunks = kHeadDim / 8;  // of 16 bytes
    const DecodeParams& p = task_.params;
    const Item& item = cursor_.item;
    const QueryRange queries = queries_of(task_, item.sequence);
    if (lane_ == 0) notes_[query_index_] = {item, cursor_.span, cursor_.first_token()};
    if (lane_ < kRows) query_rows(query_index_).inputs(lane_)->copy(task_, item, Row(task_, item, queries, lane_, kRows));
    if (task_.can_copy_query) {
      const uint32_t to = shared_address(query_rows(query_index_).data);
#pragma unroll 1
      for (int i = lane_; i < kRows * kChunks; i += 32) {
        const int r = i / kChunks, chunk = i % kChunks;
        const Row row(task_, item, queries, r, kRows);
        const auto* from = p.q.at<const uint16_t>(item.sequence, row.token, row.head) + chunk * 8;
        copy_async<16>(to + static_cast<uint32_t>(r * Query::kPitch * 2 + chunk * 16), from,
                       row.is_real && chunk * 8 < p.cache.head_dim);
      }
    }
    query_index_ = 1 - query_index_;
  }

  const Task& task_;
  char* memory_;
  ItemNote* notes_;  // [2]
  int lane_;
  TileCursor cursor_;
  int remaining_, write_index_ = 0;
  bool is_new_item_ = true;
  int query_index_ = 0;
  int page_, in_page_;  // of this lane's token in the tile to be copied next
  bool is_live_;
  uint16_t scale_bits_ = 0;
};

}  // namespace quantattn::cuda
