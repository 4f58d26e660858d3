#pragma once

#include "decode/widen.cuh"
#include "prefill/hopper_product.cuh"
#include "prefill/hopper_task.h"
#include "prefill/row_constants.cuh"

// How a block of the Hopper kernel is built: one warp brings keys, one values (the producers), the two between them make values
// harmless that not every row may see (the guard), each further warpgroup computes 64 rows (a consumer). Codes of 8 bits are
// brought to staging slots; there the two warps bring scales, and a warpgroup more turns codes into operands (the widener).
//
// K and V tiles share one ring of stages in the order in which they are used: K0, K1, V0, K2, V1, ..., the scores of a tile
// being computed beside the output of the tile before it. Tiles run from the last keys to the first.
namespace quantattn::cuda {

inline constexpr int kWarpgroupThreads = 128, kRowsPerConsumer = 64;

template <class CacheFormat, int kPaddedHeadDim>
struct HopperShape {
  static constexpr int kHeadDim = kPaddedHeadDim;
  using Format = CacheFormat;
  static constexpr bool kIsBf16 = Widen<Format>::kIsBf16, kIsWidened = Widen<Format>::kBytes == 1;
  static constexpr int kConsumers = kHeadDim == 64 && !kIsWidened ? 3 : 2, kFirstConsumer = kIsWidened ? 2 : 1,
                       kThreads = kWarpgroupThreads * (kFirstConsumer + kConsumers);
  static constexpr int kBlockRows = kRowsPerConsumer * kConsumers;
  static constexpr int kKeys = kHeadDim == 256 ? 64 : 128;  // of a tile
  static constexpr int kStages = kIsWidened && kHeadDim == 256 ? 3 : 4;
  static constexpr int kStagingSlots = 3;  // for tiles of 8-bit codes
  static constexpr int kCopySlots = kIsWidened ? kStagingSlots : kStages;

  // What setmaxnreg may share out is a multiple of 8 for each thread, 65536 for the block.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40, kWidenerRegisters = 56,
                       kLaunchRegisters = 65536 / kThreads / 8 * 8,
                       kConsumerRegisters = kIsWidened        ? 208
                                            : kConsumers == 3 ? 160
                                                              : 232;

  static constexpr int kQueryBytes = kRowsPerConsumer * kHeadDim * 2;  // of a consumer
  static constexpr int kStageBytes = kKeys * kHeadDim * 2;
  static constexpr int kCodeBytes = kIsWidened ? kKeys * kHeadDim : 0;  // of a staging slot
  static constexpr int kTileBytes = kConsumers * kQueryBytes + kStages * kStageBytes + kStagingSlots * kCodeBytes;

  // Of what the copy engine brings: blocks of channels, as wide as its permutations allow.
  static constexpr int kBoxColumns = kIsWidened ? (kHeadDim < 128 ? kHeadDim : 128) : kBlockColumns,
                       kBoxRowBytes = kBoxColumns * Widen<Format>::kBytes, kCopiedRowBytes = kHeadDim * Widen<Format>::kBytes;

  // Words that note bad keys of a tile, word w those from 32 * w on, modulo kKeys; codes: one of each warp that widens.
  static constexpr int kBadWords = kIsWidened ? kWarpgroupThreads / 32 : kKeys / 32;
};

// How the operands of a tile lie: as they were copied, or as HopperWidener writes them.
template <class Shape>
__device__ __forceinline__ AtomStrides tile_strides(const HopperTask& task) {
  return Shape::kIsWidened ? kBlockAfterBlock<Shape::kKeys> : task.boxes.strides;
}

// The tiles of keys that a row tile needs, counted from the end.
template <class Shape>
struct KeyRange {
  int first_tile, num_tiles;
  int live_from, live_to;  // the keys [live_from, live_to) are brought
  int seen_from, seen_to;  // every row sees the keys [seen_from, seen_to)
  bool is_scanned;         // the block's second pass, see HopperGuard

  KeyRange() = default;
  __device__ __forceinline__ KeyRange(const PrefillTask& task, const RowTile& rows) {
    first_tile = rows.first_key / Shape::kKeys;
    num_tiles = rows.end_key > rows.first_key ? (rows.end_key + Shape::kKeys - 1) / Shape::kKeys - first_tile : 0;
    live_from = rows.first_key;
    live_to = rows.length;
    is_scanned = false;
    const int first_position = rows.first_position() + token_of_row(task, rows.first_row),
              last_position = rows.first_position() + token_of_row(task, rows.first_row + rows.num_rows - 1);
    seen_from = task.sliding_window > 0 ? max(rows.start, last_position + 1 - task.sliding_window) : rows.start;
    seen_to = task.causal ? min(rows.length, first_position + 1) : rows.length;
  }

  __device__ __forceinline__ int first_key(int i) const { return (first_tile + num_tiles - 1 - i) * Shape::kKeys; }

  // Not all of the tile is the sequence's, or has been brought.
  __device__ __forceinline__ bool is_partial(int i) const {
    return first_key(i) < live_from || first_key(i) + Shape::kKeys > live_to;
  }

  // The guard handles the tile's V before it counts as full: where values are missing, and in a second pass where some row does
  // not see them all.
  __device__ __forceinline__ bool is_guarded(int i) const {
    return is_partial(i) || (is_scanned && (first_key(i) < seen_from || first_key(i) + Shape::kKeys > seen_to));
  }

  // When the tile's K and V enter the ring.
  __device__ __forceinline__ int step_of_key(int i) const { return max(2 * i - 1, 0); }
  __device__ __forceinline__ int step_of_value(int i) const { return i + 1 == num_tiles ? 2 * i + 1 : 2 * i + 2; }
};

__device__ __forceinline__ bool has_token_scales(const ScaleView& scale) {
  return scale.granularity == ScaleGranularity::kTokenHead;
}
__device__ __forceinline__ bool has_token_scales(const PrefillTask& task) {
  return has_token_scales(task.k_scale) || has_token_scales(task.v_scale);
}

// Scales of single tokens, of one tile. K's multiply scores. V's multiply values on their way to operands; they are relative to
// `unit`, a power of two that follows the largest so far: whatever the magnitude of V, operands use float16's upper range.
template <int kKeys>
struct TokenScales {
  float k[kKeys];
  uint32_t v[kKeys];              // twice as float16
  float unit, rescale;            // the output of the tiles before, relative to their unit, has to be multiplied by `rescale`
  uint32_t bad_keys[kKeys / 32];  // of a scanned tile: V's scale was not finite and became zero
};

// What the warps of a block tell each other in any case.
template <class Shape>
struct CommonNotes {
  uint64_t full[Shape::kStages], empty[Shape::kStages];
  RowTile tile;
  KeyRange<Shape> keys;
  PrefillRow rows[Shape::kBlockRows];
  uint32_t bad_keys[Shape::kStages][Shape::kBadWords];  // of a scanned V tile: values were not finite and became zeros
};

// The same and more: where tiles are copied as they are.
template <class Shape, bool kIsWidened = Shape::kIsWidened>
struct HopperNotes : CommonNotes<Shape> {
  uint64_t unguarded[Shape::kStages];  // full, but for the guard

  // Barriers of what the copy engine fills.
  __device__ __forceinline__ uint64_t& copied(int i, bool is_guarded) { return is_guarded ? unguarded[i] : this->full[i]; }
  __device__ __forceinline__ uint64_t& copyable(int i) { return this->empty[i]; }
};

// Where codes are widened.
template <class Shape>
struct HopperNotes<Shape, true> : CommonNotes<Shape> {
  static constexpr int kScaleSlots = 2;
  uint64_t staged[Shape::kStagingSlots], unstaged[Shape::kStagingSlots];
  uint64_t scales_full[kScaleSlots], scales_empty[kScaleSlots];
  TokenScales<Shape::kKeys> scales[kScaleSlots];

  __device__ __forceinline__ uint64_t& copied(int i, bool) { return staged[i]; }
  __device__ __forceinline__ uint64_t& copyable(int i) { return unstaged[i]; }
};

// Shared memory of a block.
template <class Shape>
struct HopperMemory {
  char* base;

  static constexpr int kBytes = Shape::kTileBytes + static_cast<int>(sizeof(HopperNotes<Shape>));

  __device__ __forceinline__ char* queries(int consumer) const { return base + consumer * Shape::kQueryBytes; }
  __device__ __forceinline__ char* stage(int i) const { return queries(Shape::kConsumers) + i * Shape::kStageBytes; }
  __device__ __forceinline__ char* copy_slot(int i) const {
    return Shape::kIsWidened ? stage(Shape::kStages) + i * Shape::kCodeBytes : stage(i);
  }
  __device__ __forceinline__ HopperNotes<Shape>& notes() const {
    return *reinterpret_cast<HopperNotes<Shape>*>(base + Shape::kTileBytes);
  }
};

// A place in the ring of stages, and the parity of the phase that fills it.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// The thread's number in its warpgroup, read where it is asked for: what is computed from it is not worth a register that
// lives through the loop.
__device__ __forceinline__ int thread_of_warpgroup() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return static_cast<int>(thread % kWarpgroupThreads);
}

// A copy that the compiler takes for a new value: sums of it and constants are not kept in registers through a loop.
__device__ __forceinline__ uint32_t own_copy(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Numbers of named barriers; 0 is __syncthreads.
inline constexpr int kGuardBarrier = 1, kTurnBarrier = 2, kConsumerBarrier = 5, kFirstKeysBarrier = 8;

}  // namespace quantattn::cuda
