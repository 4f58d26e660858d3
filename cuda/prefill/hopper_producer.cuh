#pragma once

#include "prefill/hopper_shape.cuh"

// The warp that fills the ring of K and V tiles, by copies of boxes of rows, one by each lane. A box lies in one page.
namespace quantattn::cuda {

template <class Shape>
class HopperProducer {
  static constexpr int kKeys = Shape::kKeys, kBoxesAcross = Shape::kBoxesAcross;

 public:
  __device__ __forceinline__ HopperProducer(const HopperTask& task, const HopperMemory<Shape>& memory)
      : task_(task), memory_(memory), notes_(memory.notes()), rows_(notes_.tile), keys_(notes_.keys) {}

  __device__ __forceinline__ void run() {
    page_ = read_page(0);
    next_page_ = read_page(1);
#pragma unroll 1
    for (int i = 0; i < keys_.num_tiles; ++i) {
      copy(task_.k_map, i, page_, false);
      if (i > 0) copy(task_.v_map, i - 1, previous_page_, keys_.is_guarded(i - 1));
      previous_page_ = page_;
      page_ = next_page_;
      next_page_ = read_page(i + 2);
    }
    if (keys_.num_tiles > 0) copy(task_.v_map, keys_.num_tiles - 1, previous_page_, keys_.is_guarded(keys_.num_tiles - 1));
  }

 private:
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

  // The page of the lane's rows of tile i, counted in boxes.
  __device__ __forceinline__ int read_page(int i) const {
    const PrefillTask& task = task_.prefill;
    if (task.cu_seqlens_k) return 0;
    if (!task.page_table) return rows_.sequence;
    const int row = lane() * task_.box_rows, key = keys_.first_key(i) + row;
    const bool is_live = i < keys_.num_tiles && row < kKeys && key + task_.box_rows > keys_.live_from && key < keys_.live_to;
    return is_live ? task.page_table.at(rows_.sequence, task.page_size.quotient(static_cast<unsigned>(key))) : 0;
  }

  __device__ __forceinline__ int token_in_page(int key) const {
    const PrefillTask& task = task_.prefill;
    if (task.cu_seqlens_k) return rows_.first_cached_token + key;
    return key - static_cast<int>(task.page_size.quotient(static_cast<unsigned>(key)) * task.page_size.divisor);
  }

  // Brings tile i to the next stage.
  __device__ __forceinline__ void copy(const CUtensorMap& map, int i, int page, bool is_guarded) {
    const int first_key = keys_.first_key(i), box_rows = task_.box_rows,
              first_box = max(keys_.live_from - first_key, 0) / box_rows,
              end_box = (min(keys_.live_to - first_key, kKeys) + box_rows - 1) / box_rows;
    const int num_boxes = (end_box - first_box) * kBoxesAcross, box = first_box + lane() / kBoxesAcross,
              block = lane() % kBoxesAcross, row = box * box_rows;
    const int own_page = __shfl_sync(0xFFFFFFFFu, page, box % 32);
    wait_for(shared_address(&notes_.copyable(place_.stage)), place_.parity ^ 1);
    const uint32_t copied = shared_address(&notes_.copied(place_.stage, is_guarded));
    if (lane() == 0) arrive_expecting(copied, num_boxes * box_rows * Shape::kBoxRowBytes);
    __syncwarp();
    if (lane() < num_boxes)
      copy_box(shared_address(memory_.copy_slot(place_.stage)) + (block * kKeys + row) * Shape::kBoxRowBytes, map,
               block * Shape::kBoxColumns, rows_.kv_head, token_in_page(first_key + row), own_page, copied);
    place_.advance();
  }

  const HopperTask& task_;
  const HopperMemory<Shape>& memory_;
  HopperNotes<Shape>& notes_;
  const RowTile& rows_;
  const KeyRange<Shape>& keys_;
  RingPlace<Shape::kCopySlots> place_;
  int page_ = 0, previous_page_ = 0, next_page_ = 0;  // of the tile whose K comes next, of the ones before and after it
};

}  // namespace quantattn::cuda
