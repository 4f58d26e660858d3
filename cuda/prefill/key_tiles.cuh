#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "decode/ptx.cuh"
#include "decode/widen.cuh"
#include "prefill/row_tile.cuh"

// Brings tiles of K and V to shared memory as 16-bit operands. Copies run one tile ahead; what they need (pages, then
// addresses) is prepared in the two steps before. Codes of 8 bits are copied as they are and widened once for the whole block.
namespace quantattn::cuda {

// Rows of 16-bit operands in chunks of 16 bytes, permuted so that eight rows of one chunk lie in different banks.
template <int kHeadDim>
struct OperandLayout {
  static constexpr int kRowBytes = 2 * kHeadDim, kChunks = kRowBytes / 16;
  static_assert(kChunks % 8 == 0);
  __device__ __forceinline__ static int chunk_offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) * 16);
  }
};

// Shared memory of K or of V: two stages of operands, or two stages of codes and one of operands.
template <class Format, int kHeadDim, int kKeys>
struct TileMemory {
  static constexpr bool kIsWidened = Widen<Format>::kBytes == 1;
  static constexpr int kCodeBytes = kKeys * kHeadDim * Widen<Format>::kBytes, kOperandBytes = kKeys * 2 * kHeadDim;
  static constexpr int kBytes = kIsWidened ? 2 * kCodeBytes + kOperandBytes : 2 * kOperandBytes;

  __device__ __forceinline__ static char* codes(char* memory, int tile) { return memory + (tile & 1) * kCodeBytes; }
  __device__ __forceinline__ static char* operands(char* memory, int tile) {
    return kIsWidened ? memory + 2 * kCodeBytes : codes(memory, tile);
  }
  // Where 16 bytes (`chunk` of a row) of the cache are copied to.
  __device__ __forceinline__ static int chunk_offset(int row, int chunk) {
    if constexpr (kIsWidened) return row * kHeadDim + chunk * 16;
    return OperandLayout<kHeadDim>::chunk_offset(row, chunk);
  }
};

// What threads tell each other about the keys of a tile.
template <int kKeys>
struct KeyNotes {
  int64_t k_offset[2][kKeys], v_offset[2][kKeys];  // bytes from the data; kDeadKey: not to be read, zero
  float k_scale[2][kKeys], v_scale[2][kKeys];      // of single tokens, else 1
  int page[2][kKeys];
  uint64_t bad_keys[2];  // bit j: key j; see KeyTiles::bad_keys()
};
inline constexpr int64_t kDeadKey = -1;

template <class KFormat, class VFormat, int kHeadDim, int kKeysPerTile, int kThreads>
class KeyTiles {
  using KMemory = TileMemory<KFormat, kHeadDim, kKeysPerTile>;
  using VMemory = TileMemory<VFormat, kHeadDim, kKeysPerTile>;
  static_assert(kThreads >= kKeysPerTile);

 public:
  static constexpr int kKeys = kKeysPerTile;
  using Notes = KeyNotes<kKeys>;
  static constexpr bool kHasScales = KFormat::kHasScale || VFormat::kHasScale;
  static constexpr int kBytes = KMemory::kBytes + VMemory::kBytes;

  __device__ __forceinline__ KeyTiles(const PrefillTask& task, const RowTile& rows, char* memory, Notes& notes)
      : task_(task), rows_(rows), k_memory_(memory), v_memory_(memory + KMemory::kBytes), notes_(notes) {
    fetch_pages(0);
    fetch_pages(1);
    if (task.page_table) {
      commit_copies();
      wait_copies<0>();
    }
    locate(0);
    __syncthreads();
  }

  __device__ __forceinline__ int num_tiles() const { return max(0, (rows_.end_key - rows_.first_key + kKeys - 1) / kKeys); }
  __device__ __forceinline__ int first_key(int tile) const { return rows_.first_key + tile * kKeys; }
  __device__ __forceinline__ const char* k(int tile) const { return KMemory::operands(k_memory_, tile); }
  __device__ __forceinline__ const char* v(int tile) const { return VMemory::operands(v_memory_, tile); }
  __device__ __forceinline__ const float* k_scale(int tile) const { return notes_.k_scale[tile & 1]; }
  __device__ __forceinline__ const float* v_scale(int tile) const { return notes_.v_scale[tile & 1]; }

  // Waits for a tile, and for all threads to leave the tile before. Where rows do not see all of it (`is_masked`), values that
  // are not finite are taken out of it; see bad_keys().
  __device__ __forceinline__ void wait(int tile, bool is_masked) {
    wait_copies<0>();
    __syncthreads();
    if constexpr (KMemory::kIsWidened) widen<KFormat>(KMemory::codes(k_memory_, tile), KMemory::operands(k_memory_, tile));
    if constexpr (VMemory::kIsWidened) widen<VFormat>(VMemory::codes(v_memory_, tile), VMemory::operands(v_memory_, tile));
    if (KMemory::kIsWidened || VMemory::kIsWidened) __syncthreads();
    if (is_masked && __syncthreads_or(has_bad_values(tile))) {
      take_out_bad_values(tile);
      __syncthreads();
    }
  }

  // Starts to copy a tile, and prepares the next ones. All threads have left the tile two before.
  __device__ __forceinline__ void start(int tile) {
    if (thread_index() == 0) notes_.bad_keys[tile & 1] = 0;
    if (is_live(first_key(tile))) {
      const bool is_run = is_one_run(tile);
      copy_side<KFormat>(task_.k, notes_.k_offset[tile & 1], KMemory::codes(k_memory_, tile), is_run);
      copy_side<VFormat>(task_.v, notes_.v_offset[tile & 1], VMemory::codes(v_memory_, tile), is_run);
    }
    store_scales(tile);
    locate(tile + 1);
    fetch_pages(tile + 2);
    commit_copies();
  }

  // Keys of a masked tile whose values or whose scale held NaN or infinity: bit j stands for key j. Zero
  // times such a value would be NaN in rows that do not see the key.
  __device__ __forceinline__ uint64_t bad_keys(int tile) const { return notes_.bad_keys[tile & 1]; }

 private:
  __device__ __forceinline__ bool is_live(int key) const { return key < rows_.end_key; }

  __device__ __forceinline__ int place_in_page(int key) const {
    return key - static_cast<int>(task_.page_size.quotient(static_cast<unsigned>(key)) * task_.page_size.divisor);
  }

  // Thread i starts to read the page of key i of a tile.
  __device__ __forceinline__ void fetch_pages(int tile) {
    const int key = first_key(tile) + thread_index();
    if (!task_.page_table || thread_index() >= kKeys || !is_live(key)) return;
    const auto column = task_.page_size.quotient(static_cast<unsigned>(key));
    copy_async<4>(shared_address(notes_.page[tile & 1] + thread_index()), &task_.page_table.at(rows_.sequence, column), true);
  }

  // Thread i turns the page it has loaded into addresses of key i, and starts to read its scales. A page id outside the pool
  // reads as zeros.
  __device__ __forceinline__ void locate(int tile) {
    if (thread_index() >= kKeys) return;
    const int key = first_key(tile) + thread_index();
    int64_t page = task_.cu_seqlens_k ? 0 : rows_.sequence;
    int in_page = rows_.first_cached_token + key;
    if (task_.page_table) {
      page = notes_.page[tile & 1][thread_index()];
      in_page = place_in_page(key);
    }
    const bool live = is_live(key) && page >= 0 && page < task_.num_pages;
    notes_.k_offset[tile & 1][thread_index()] = live ? offset_of(task_.k, page, in_page) : kDeadKey;
    notes_.v_offset[tile & 1][thread_index()] = live ? offset_of(task_.v, page, in_page) : kDeadKey;
    if constexpr (kHasScales)
      scale_bits_ = token_scale(task_.k_scale, page, in_page, live) | token_scale(task_.v_scale, page, in_page, live) << 16;
  }
  __device__ __forceinline__ int64_t offset_of(const CodeAddresses& codes, int64_t page, int in_page) const {
    return page * codes.page_bytes + in_page * codes.token_bytes + rows_.kv_head * codes.head_bytes;
  }
  __device__ __forceinline__ uint32_t token_scale(const ScaleView& scale, int64_t page, int in_page, bool live) const {
    if (scale.granularity != ScaleGranularity::kTokenHead) return 0x3C00;
    return live ? static_cast<const uint16_t*>(scale.data)[scale.offset(page, in_page, rows_.kv_head)] : 0;
  }

  __device__ __forceinline__ void store_scales(int tile) {
    if (!kHasScales || thread_index() >= kKeys) return;
    notes_.k_scale[tile & 1][thread_index()] = __half2float(__ushort_as_half(static_cast<uint16_t>(scale_bits_)));
    notes_.v_scale[tile & 1][thread_index()] = __half2float(__ushort_as_half(static_cast<uint16_t>(scale_bits_ >> 16)));
  }

  // 16 bytes of the values that this thread looks after.
  __device__ __forceinline__ uint4& own_values(int tile, int i) const {
    constexpr int kChunks = OperandLayout<kHeadDim>::kChunks;
    const int index = thread_index() + i * kThreads;
    return *reinterpret_cast<uint4*>(VMemory::operands(v_memory_, tile) +
                                     OperandLayout<kHeadDim>::chunk_offset(index / kChunks, index % kChunks));
  }
  static constexpr int kOwnValues = kKeys * OperandLayout<kHeadDim>::kChunks / kThreads;

  // Whether this thread looks after a value or a scale that is not finite: zero times it is not zero.
  __device__ __forceinline__ bool has_bad_values(int tile) const {
    using Pair = std::conditional_t<Widen<VFormat>::kIsBf16, __nv_bfloat162, __half2>;
    Pair sum = {};
    const Pair zero = {};
#pragma unroll
    for (int i = 0; i < kOwnValues; ++i) {
      const uint4 x = own_values(tile, i);
      for (const uint32_t& pair : {x.x, x.y, x.z, x.w}) sum = __hfma2(reinterpret_cast<const Pair&>(pair), zero, sum);
    }
    float bad = __low2float(sum) + __high2float(sum);
    if (VFormat::kHasScale && thread_index() < kKeys) bad += 0.f * notes_.v_scale[tile & 1][thread_index()];
    return bad != 0.f;
  }

  __device__ __forceinline__ void note_bad_key(int tile, int key) {
    atomicOr(reinterpret_cast<unsigned long long*>(notes_.bad_keys + (tile & 1)), 1ull << key);
  }

  __device__ __forceinline__ void take_out_bad_values(int tile) {
    // Of a float16 or of a bfloat16 that is not finite, all bits of the exponent are set.
    constexpr uint32_t kExponent = Widen<VFormat>::kIsBf16 ? 0x7F807F80u : 0x7C007C00u;
#pragma unroll 1
    for (int i = 0; i < kOwnValues; ++i) {
      uint4& x = own_values(tile, i);
      bool is_bad = false;
      for (uint32_t pair : {x.x, x.y, x.z, x.w}) is_bad |= __vcmpeq2(pair & kExponent, kExponent) != 0;
      if (!is_bad) continue;
      x = {};
      note_bad_key(tile, (thread_index() + i * kThreads) / OperandLayout<kHeadDim>::kChunks);
    }
    if (!VFormat::kHasScale || thread_index() >= kKeys) return;
    float& scale = notes_.v_scale[tile & 1][thread_index()];
    if (isfinite(scale)) return;
    scale = 0.f;
    note_bad_key(tile, thread_index());
  }

  // True where all keys of a tile are live and follow each other in one page.
  __device__ __forceinline__ bool is_one_run(int tile) const {
    const int key = first_key(tile);
    if (key + kKeys > rows_.end_key || notes_.k_offset[tile & 1][0] == kDeadKey) return false;
    return !task_.page_table || place_in_page(key) + kKeys <= static_cast<int>(task_.page_size.divisor);
  }

  // Rows that are dead, and the padding of the others, become zeros and are not read.
  template <class Format>
  __device__ __forceinline__ void copy_side(const CodeAddresses& codes, const int64_t* offsets, char* to, bool is_run) const {
    using Memory = TileMemory<Format, kHeadDim, kKeys>;
    constexpr int kChunks = kHeadDim * Widen<Format>::kBytes / 16, kRowsPerStep = kThreads / kChunks;
    if (codes.copy_bytes != 16) {
      copy_unaligned<Format>(codes, offsets, to);
      return;
    }
    const int row = thread_index() / kChunks, chunk = thread_index() % kChunks;
    const uint32_t address = shared_address(to);
    if (is_run) {
      const char* from = codes.data + (offsets[row] + chunk * 16);
#pragma unroll
      for (int i = 0; i < kKeys / kRowsPerStep; ++i, from += kRowsPerStep * codes.token_bytes)
        copy_async<16>(address + Memory::chunk_offset(i * kRowsPerStep + row, chunk), from, chunk * 16 < codes.row_bytes);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kKeys / kRowsPerStep; ++i) {
      const int64_t offset = offsets[i * kRowsPerStep + row];
      copy_async<16>(address + Memory::chunk_offset(i * kRowsPerStep + row, chunk), codes.data + (offset + chunk * 16),
                     offset != kDeadKey && chunk * 16 < codes.row_bytes);
    }
  }

  template <class Format>
  __device__ __forceinline__ void copy_unaligned(const CodeAddresses& codes, const int64_t* offsets, char* to) const {
    using Memory = TileMemory<Format, kHeadDim, kKeys>;
    constexpr int kElementBytes = Widen<Format>::kBytes, kRowBytes = kHeadDim * kElementBytes;
    const int step = codes.copy_bytes == 8 ? 8 : kElementBytes, per_row = kRowBytes / step;
#pragma unroll 1
    for (int i = thread_index(); i < kKeys * per_row; i += kThreads) {
      const int row = i / per_row, byte = (i - row * per_row) * step;
      const int64_t offset = offsets[row];
      const bool live = offset != kDeadKey && byte < codes.row_bytes;
      const char* from = codes.data + (offset + byte);
      char* target = to + Memory::chunk_offset(row, byte / 16) + byte % 16;
      if (step == 8)
        copy_async<8>(shared_address(target), from, live);
      else if constexpr (kElementBytes == 1)
        *target = live ? *from : 0;
      else
        *reinterpret_cast<uint16_t*>(target) = live ? *reinterpret_cast<const uint16_t*>(from) : uint16_t{0};
    }
  }

  // 16 codes become two chunks of operands; every other four threads store them in the other order, so that eight threads
  // meet eight banks.
  template <class Format>
  __device__ __forceinline__ static void widen(const char* codes, char* operands) {
    using Layout = OperandLayout<kHeadDim>;
    constexpr int kChunks = kHeadDim / 16, kSteps = kKeys * kChunks / kThreads;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int index = thread_index() + i * kThreads, row = index / kChunks, chunk = index % kChunks;
      const uint4 raw = *reinterpret_cast<const uint4*>(codes + index * 16);
      uint4 low, high;
      Widen<Format>::template widen<ByteOrder::kAdjacent>(raw.x, low.x, low.y);
      Widen<Format>::template widen<ByteOrder::kAdjacent>(raw.y, low.z, low.w);
      Widen<Format>::template widen<ByteOrder::kAdjacent>(raw.z, high.x, high.y);
      Widen<Format>::template widen<ByteOrder::kAdjacent>(raw.w, high.z, high.w);
      const int swap = chunk >> 2 & 1;
      *reinterpret_cast<uint4*>(operands + Layout::chunk_offset(row, 2 * chunk + swap)) = swap ? high : low;
      *reinterpret_cast<uint4*>(operands + Layout::chunk_offset(row, 2 * chunk + 1 - swap)) = swap ? low : high;
    }
  }

  const PrefillTask& task_;
  const RowTile& rows_;
  char *k_memory_, *v_memory_;
  Notes& notes_;
  uint32_t scale_bits_ = 0;  // of this thread's key in the tile located last: K's, then V's
};

}  // namespace quantattn::cuda
