#pragma once

#include "prefill/hopper_consumer.cuh"
#include "prefill/hopper_guard.cuh"
#include "prefill/hopper_producer.cuh"
#include "prefill/hopper_rows.cuh"
#include "prefill/hopper_scales.cuh"
#include "prefill/hopper_widener.cuh"

// The prefill kernel of sm_90a.
namespace quantattn::cuda {

// One consumer's part of the block. False where an output is not finite.
template <class Shape>
__device__ __forceinline__ bool consume(const HopperTask& hopper, const HopperMemory<Shape>& memory, int consumer) {
  const PrefillTask& task = hopper.prefill;
  HopperNotes<Shape>& notes = memory.notes();
  const RowTile& tile = notes.tile;
  const int first_row = consumer * kRowsPerConsumer;
  const QueryRows<Shape> queries(task, tile, consumer, memory.queries(consumer));
  queries.start();
  queries.finish(notes.rows + first_row);
  HopperConsumer<Shape> engine(task, tile_strides<Shape>(hopper), memory, consumer);
  engine.run();
  const bool is_finite = engine.finish(task.q_dtype == DType::kBFloat16, [&](int r, float maximum, float sum) {
    const int row = tile.first_row + min(first_row + r, tile.num_rows - 1), token = token_of_row(task, row),
              head = head_of_row(task, tile.kv_head, row, token);
    const PrefillRowEnd end = finish_prefill_row(task, notes.rows[first_row + r], head, maximum, sum);
    if (threadIdx.x % 32 < 16 && task.lse != nullptr && first_row + r < tile.num_rows)
      task.lse[static_cast<int64_t>(tile.first_token + token) * task.num_q_heads + head] = end.lse;
    return end.multiplier * static_scale(task.v_scale, tile.kv_head);
  });
  write_consumer_rows<Shape>(task, tile, consumer, memory.queries(consumer));
  return is_finite;
}

// Calls act(barrier, number of arrivals that end a phase) for the barriers of a pass.
template <class Shape, class Act>
__device__ __forceinline__ void for_each_barrier(HopperNotes<Shape>& notes, const Act& act) {
  constexpr int kWarps = kWarpgroupThreads / 32, kConsumerWarps = Shape::kConsumers * kWarps;
  for (uint64_t& barrier : notes.full) act(barrier, Shape::kIsWidened ? kWarps : 1);
  for (uint64_t& barrier : notes.empty) act(barrier, kConsumerWarps);
  if constexpr (Shape::kIsWidened) {
    for (uint64_t& barrier : notes.staged) act(barrier, 1);
    for (uint64_t& barrier : notes.unstaged) act(barrier, kWarps);
    // Every lane arrives, since every lane writes or reads scales of its own.
    for (uint64_t& barrier : notes.scales_full) act(barrier, 2 * 32);
    for (uint64_t& barrier : notes.scales_empty) act(barrier, (kConsumerWarps + kWarps) * 32);
  } else {
    for (uint64_t& barrier : notes.unguarded) act(barrier, 1);
  }
}

template <class Shape>
__device__ __forceinline__ void init_barriers(HopperNotes<Shape>& notes) {
  for_each_barrier(notes, [](uint64_t& barrier, int num_arrivals) { init_barrier(shared_address(&barrier), num_arrivals); });
  publish_barriers();
}

// Prepares the second pass, see HopperGuard.
template <class Shape>
__device__ __forceinline__ void begin_second_pass(HopperNotes<Shape>& notes) {
  for_each_barrier(notes, [](uint64_t& barrier, int) { invalidate_barrier(shared_address(&barrier)); });
  init_barriers(notes);
  notes.keys.is_scanned = true;
}

// The part of the first warpgroup: the first and the last warp copy tiles, the others look after them or bring scales.
template <class Shape>
__device__ __forceinline__ void produce(const HopperTask& task, const HopperMemory<Shape>& memory) {
  const unsigned warp = threadIdx.x / 32;
  if (warp == 0 || warp == 3)
    HopperProducer<Shape>(task, memory, warp == 3).run();
  else if constexpr (!Shape::kIsWidened)
    HopperGuard<Shape>(task, memory).run();
  else if (has_token_scales(task.prefill))
    HopperScales<Shape>(task.prefill, memory, warp == 2).run();
}

// A block for each row tile and KV head.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) hopper_prefill_kernel(const __grid_constant__ HopperTask task) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared_memory[];
  const HopperMemory<Shape> memory{shared_memory};
  HopperNotes<Shape>& notes = memory.notes();
  // Uniform over the warp, and known to be so.
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (threadIdx.x == kWarpgroupThreads) {
    init_barriers(notes);
    prefetch_map(task.k_map);
    prefetch_map(task.v_map);
  }
  overlap_launches();
  if (threadIdx.x == 0) notes.tile.exists = false;
  if (threadIdx.x < 32) {
    __syncwarp();
    find_row_tile(task.prefill, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), Shape::kBlockRows,
                  [&](const RowTile& found) {
                    notes.tile = found;
                    notes.keys = KeyRange<Shape>(task.prefill, found);
                  });
  }
  __syncthreads();
  if (!notes.tile.exists) return;
  // All roles end a pass at one barrier, with the registers of the launch, so that one loop can hold them.
  for (;;) {
    bool is_finite = true;
    if (warpgroup == 0) {
      shrink_registers<Shape::kProducerRegisters>();
      produce(task, memory);
      grow_registers<Shape::kLaunchRegisters>();
    } else if (warpgroup < Shape::kFirstConsumer) {
      shrink_registers<Shape::kWidenerRegisters>();
      if constexpr (Shape::kIsWidened) HopperWidener<Shape>(memory, has_token_scales(task.prefill)).run();
      grow_registers<Shape::kLaunchRegisters>();
    } else {
      grow_registers<Shape::kConsumerRegisters>();
      is_finite = consume<Shape>(task, memory, warpgroup - Shape::kFirstConsumer);
      shrink_registers<Shape::kLaunchRegisters>();
    }
    if (notes.keys.is_scanned || __syncthreads_or(!is_finite) == 0) return;
    if (threadIdx.x == 0) begin_second_pass(notes);
    __syncthreads();
  }
#endif
}

}  // namespace quantattn::cuda
