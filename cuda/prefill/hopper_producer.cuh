#pragma once

#include "prefill/hopper_shape.cuh"

// A warp that brings tiles to the ring, those of K or those of V, by copies of boxes of rows, one by each lane. A box lies in
// one page. Lanes issue one after the other, some 55 clocks each: small pages keep a warp busy, hence one each for K and V.
namespace quantattn::cuda {

template <class Shape>
class HopperProducer {
  static constexpr int kKeys = Shape::kKeys;

 public:
  __device__ __forceinline__ HopperProducer(const HopperTask& task, const HopperMemory<Shape>& memory, bool are_values)
      : task_(task),
        map_(are_values ? task.v_map : task.k_map),
        memory_(memory),
        notes_(memory.notes()),
        rows_(notes_.tile),
        keys_(notes_.keys),
        are_values_(are_values),
        head_(rows_.kv_head * (are_values ? task.v_head_step : task.k_head_step)) {}

  __device__ __forceinline__ void run() const {
    if (keys_.num_tiles == 0) return;
    int page = read_page(0), next_page = read_page(1);
    if (are_values_) meet(kFirstKeysBarrier, 2 * 32);
#pragma unroll 1
    for (int i = 0; i < keys_.num_tiles; ++i) {
      copy(i, page);
      if (i == 0 && !are_values_) let_values_follow();
      page = next_page;
      next_page = read_page(i + 2);
    }
  }

 private:
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

  // The block waits for its first keys: the copies of the first values must not take their time.
  __device__ __forceinline__ static void let_values_follow() {
    __syncwarp();
    arrive_at(kFirstKeysBarrier, 2 * 32);
  }

  // The page of the lane's rows of tile i, counted in boxes.
  __device__ __forceinline__ int read_page(int i) const {
    const PrefillTask& task = task_.prefill;
    if (task.cu_seqlens_k) return 0;
    if (!task.page_table) return rows_.sequence;
    const int row = lane() << task_.boxes.rows_log2, key = keys_.first_key(i) + row,
              end_key = key + (1 << task_.boxes.rows_log2);
    const bool is_live = i < keys_.num_tiles && row < kKeys && end_key > keys_.live_from && key < keys_.live_to;
    return is_live ? task.page_table.at(rows_.sequence, task.page_size.quotient(static_cast<unsigned>(key))) : 0;
  }

  __device__ __forceinline__ int token_in_page(int key) const {
    const PrefillTask& task = task_.prefill;
    if (task.cu_seqlens_k) return rows_.first_cached_token + key;
    return key - static_cast<int>(task.page_size.quotient(static_cast<unsigned>(key)) * task.page_size.divisor);
  }

  // Brings tile i to its place in the ring.
  __device__ __forceinline__ void copy(int i, int page) const {
    const HopperBoxes& boxes = task_.boxes;
    const int first_key = keys_.first_key(i), first_box = max(keys_.live_from - first_key, 0) >> boxes.rows_log2,
              end_box = ((min(keys_.live_to - first_key, kKeys) - 1) >> boxes.rows_log2) + 1;
    const int box = first_box + (lane() >> boxes.across_log2), block = lane() & ((1 << boxes.across_log2) - 1),
              row = box << boxes.rows_log2;
    const int own_page = __shfl_sync(0xFFFFFFFFu, page, box % 32);
    const int step = are_values_ ? keys_.step_of_value(i) : keys_.step_of_key(i), slot = step % Shape::kCopySlots;
    wait_for(shared_address(&notes_.copyable(slot)), step / Shape::kCopySlots % 2 ^ 1);
    const uint32_t copied = shared_address(&notes_.copied(slot, are_values_ && keys_.is_guarded(i)));
    if (lane() == 0) arrive_expecting(copied, ((end_box - first_box) << boxes.rows_log2) * Shape::kCopiedRowBytes);
    __syncwarp();
    if (box >= end_box) return;
    const uint32_t atom =
        static_cast<uint32_t>(block) * boxes.strides.block + static_cast<uint32_t>(row / 8) * boxes.strides.group;
    copy_box(shared_address(memory_.copy_slot(slot)) + 16 * atom, map_, block * Shape::kBoxColumns,
             token_in_page(first_key + row), head_, 0, own_page, copied);
  }

  const HopperTask& task_;
  const CUtensorMap& map_;
  const HopperMemory<Shape>& memory_;
  HopperNotes<Shape>& notes_;
  const RowTile& rows_;
  const KeyRange<Shape>& keys_;
  bool are_values_;
  int head_;
};

}  // namespace quantattn::cuda
