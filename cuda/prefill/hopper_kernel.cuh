#pragma once

#include "prefill/hopper_consumer.cuh"
#include "prefill/hopper_guard.cuh"
#include "prefill/hopper_producer.cuh"
#include "prefill/hopper_scales.cuh"
#include "prefill/hopper_widener.cuh"
#include "prefill/query_chunk.cuh"

// The prefill kernel of sm_90a.
namespace quantattn::cuda {

// A consumer's query rows on their way to shared memory: each thread brings some chunks of 16 bytes.
template <class Shape>
class QueryRows {
  static constexpr int kChunks = Shape::kHeadDim / 8, kRowsPerStep = kWarpgroupThreads / kChunks;

 public:
  __device__ __forceinline__ QueryRows(const PrefillTask& task, const RowTile& tile, int consumer, char* queries)
      : task_(task),
        tile_(tile),
        queries_(queries),
        first_row_(consumer * kRowsPerConsumer),
        barrier_(kConsumerBarrier + consumer),
        thread_(thread_of_warpgroup()),
        chunk_(thread_ % kChunks) {}

  // Starts the copies. Rows and channels beyond the last become zeros.
  __device__ __forceinline__ void start() const {
#pragma unroll 1
    for (int r = thread_ / kChunks; r < kRowsPerConsumer; r += kRowsPerStep) {
      const int row = tile_.first_row + min(first_row_ + r, tile_.num_rows - 1), token = token_of_row(task_, row);
      const auto* from =
          task_.q.at<const uint16_t>(0, tile_.first_token + token, head_of_row(task_, tile_.kv_head, row, token));
      const bool is_live = first_row_ + r < tile_.num_rows && 8 * chunk_ < task_.head_dim;
      if (task_.can_copy_rows)
        copy_async<16>(shared_address(place(r)), is_live ? from + 8 * chunk_ : from, is_live);
      else
        *place(r) = is_live ? read_query_chunk(task_, from, chunk_) : uint4{};
    }
    commit_copies();
  }

  // Waits for them and makes operands of them; finds out what belongs to each row.
  __device__ __forceinline__ void finish(PrefillRow* rows) const {
    wait_copies<0>();
    const bool is_converted = !Shape::kIsBf16 && task_.q_dtype == DType::kBFloat16,
               is_negated = score_scale(task_, tile_.kv_head) < 0.f;
    if (is_converted || is_negated) {
#pragma unroll 1
      for (int r = thread_ / kChunks; r < kRowsPerConsumer; r += kRowsPerStep) {
        uint4 x = *place(r);
        const float unit = is_converted ? convert_query_chunk<kChunks>(x) : 1.f;
        const unsigned sign = is_negated ? 0x80008000u : 0u;
        *place(r) = {x.x ^ sign, x.y ^ sign, x.z ^ sign, x.w ^ sign};
        if (chunk_ == 0) rows[r].factor = unit;
      }
      meet(barrier_, kWarpgroupThreads);
    }
    if (thread_ < kRowsPerConsumer)
      rows[thread_] = prefill_row(task_, tile_, first_row_ + thread_, is_converted ? rows[thread_].factor : 1.f, 0.f);
    publish_to_async_proxy();
    meet(barrier_, kWarpgroupThreads);
  }

 private:
  __device__ __forceinline__ uint4* place(int r) const {
    return reinterpret_cast<uint4*>(queries_ + operand_offset<kRowsPerConsumer>(r, chunk_));
  }

  const PrefillTask& task_;
  const RowTile& tile_;
  char* queries_;
  int first_row_, barrier_, thread_, chunk_;
};

// Writes a warp's 16 finished rows, which lie in shared memory in the output's dtype.
template <class Shape>
__device__ __forceinline__ void write_consumer_rows(const PrefillTask& task, const RowTile& tile, int consumer,
                                                    const char* rows) {
  constexpr int kChunks = Shape::kHeadDim / 8, kRowsPerStep = 32 / kChunks;
  const int thread = thread_of_warpgroup(), lane = thread % 32, warp = thread / 32, chunk = lane % kChunks;
#pragma unroll 4
  for (int r = 16 * warp + lane / kChunks; r < 16 * warp + 16; r += kRowsPerStep) {
    const int row_in_tile = consumer * kRowsPerConsumer + r;
    if (row_in_tile >= tile.num_rows || 8 * chunk >= task.head_dim) continue;
    const int row = tile.first_row + row_in_tile, token = token_of_row(task, row);
    const uint4 x = *reinterpret_cast<const uint4*>(rows + operand_offset<kRowsPerConsumer>(r, chunk));
    uint16_t* to = task.out.at<uint16_t>(0, tile.first_token + token, head_of_row(task, tile.kv_head, row, token)) + 8 * chunk;
    if (task.can_copy_rows) {
      *reinterpret_cast<uint4*>(to) = x;
    } else {
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
    }
  }
}

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
    if (threadIdx.x % 4 == 0 && task.lse != nullptr && first_row + r < tile.num_rows)
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
    for (uint64_t& barrier : notes.scales_full) act(barrier, 2);
    for (uint64_t& barrier : notes.scales_empty) act(barrier, kConsumerWarps + kWarps);
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
  if (threadIdx.x < 32) {
    find_row_tile(task.prefill, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), Shape::kBlockRows, notes.tile);
    __syncwarp();
    if (threadIdx.x == 0 && notes.tile.exists) notes.keys = KeyRange<Shape>(task.prefill, notes.tile);
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
