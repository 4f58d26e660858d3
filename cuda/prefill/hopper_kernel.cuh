#pragma once

#include "prefill/hopper_consumer.cuh"
#include "prefill/hopper_guard.cuh"
#include "prefill/hopper_producer.cuh"
#include "prefill/hopper_scales.cuh"
#include "prefill/hopper_widener.cuh"
#include "prefill/query_chunk.cuh"

// The prefill kernel of sm_90a.
namespace quantattn::cuda {

// How a warp of a consumer goes through its 16 rows: kChunks neighbouring lanes have a row, 16 bytes each. To find out where a
// row lies in the batch takes longer than to copy a piece of it: so each lane does that for one row, and the others ask it.
template <int kChunks>
struct WarpRows {
  static constexpr int kRowsPerStep = 32 / kChunks, kSteps = 16 / kRowsPerStep;
  const int lane = thread_of_warpgroup() % 32, first_row = thread_of_warpgroup() / 32 * 16, chunk = lane % kChunks;

  // Of the consumer: the row whose address the lane finds out, and the row that it copies in a step.
  __device__ __forceinline__ int addressed_row() const { return first_row + lane % 16; }
  __device__ __forceinline__ int row(int step) const { return first_row + step * kRowsPerStep + lane / kChunks; }

  template <class T>
  __device__ __forceinline__ T* ask(T* addressed, int step) const {
    return reinterpret_cast<T*>(
        __shfl_sync(0xFFFFFFFFu, reinterpret_cast<unsigned long long>(addressed), step * kRowsPerStep + lane / kChunks));
  }
};

// Where a row of the tile, or its last one, lies among the query vectors or those of the output.
template <class T>
__device__ __forceinline__ T* address_of_row(const PrefillTask& task, const VectorArray& vectors, const RowTile& tile,
                                             int row_in_tile) {
  const int row = tile.first_row + min(row_in_tile, tile.num_rows - 1), token = token_of_row(task, row);
  return vectors.at<T>(0, tile.first_token + token, head_of_row(task, tile.kv_head, row, token));
}

// A consumer's query rows on their way to shared memory.
template <class Shape>
class QueryRows {
  using Rows = WarpRows<Shape::kHeadDim / 8>;

 public:
  __device__ __forceinline__ QueryRows(const PrefillTask& task, const RowTile& tile, int consumer, char* queries)
      : task_(task), tile_(tile), queries_(queries), consumer_(consumer) {}

  // Starts the copies. Rows and channels beyond the last become zeros.
  __device__ __forceinline__ void start() const {
    const auto* own =
        address_of_row<const uint16_t>(task_, task_.q, tile_, kRowsPerConsumer * consumer_ + rows_.addressed_row());
    const auto is_live = [&](int r) {
      return kRowsPerConsumer * consumer_ + r < tile_.num_rows && 8 * rows_.chunk < task_.head_dim;
    };
    if (task_.can_copy_rows) {
#pragma unroll 8
      for (int i = 0; i < Rows::kSteps; ++i) {
        const int r = rows_.row(i);
        const auto* from = rows_.ask(own, i);
        copy_async<16>(shared_address(place(r)), is_live(r) ? from + 8 * rows_.chunk : from, is_live(r));
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < Rows::kSteps; ++i) {
        const int r = rows_.row(i);
        const auto* from = rows_.ask(own, i);
        *place(r) = is_live(r) ? read_query_chunk(task_, from, rows_.chunk) : uint4{};
      }
    }
    commit_copies();
  }

  // Finds out what belongs to each row, waits for the copies and makes operands of them.
  __device__ __forceinline__ void finish(PrefillRow* notes) const {
    const bool is_converted = !Shape::kIsBf16 && task_.q_dtype == DType::kBFloat16,
               is_negated = score_scale(task_, tile_.kv_head) < 0.f;
    const int r = thread_of_warpgroup();
    if (r < kRowsPerConsumer) notes[r] = prefill_row(task_, tile_, kRowsPerConsumer * consumer_ + r, 1.f, 0.f);
    wait_copies<0>();
    if (is_converted || is_negated) {
      meet(kConsumerBarrier + consumer_, kWarpgroupThreads);
      convert(notes, is_converted, is_negated ? 0x80008000u : 0u);
    }
    publish_to_async_proxy();
    meet(kConsumerBarrier + consumer_, kWarpgroupThreads);
  }

 private:
  __device__ __forceinline__ uint4* place(int r) const {
    return reinterpret_cast<uint4*>(queries_ + operand_offset<kRowsPerConsumer>(r, rows_.chunk));
  }

  // A row's factor takes in what its converted elements were divided by.
  __device__ __forceinline__ void convert(PrefillRow* notes, bool is_converted, unsigned sign) const {
#pragma unroll 1
    for (int i = 0; i < Rows::kSteps; ++i) {
      const int r = rows_.row(i);
      uint4 x = *place(r);
      const float unit = is_converted ? convert_query_chunk<Shape::kHeadDim / 8>(x) : 1.f;
      *place(r) = {x.x ^ sign, x.y ^ sign, x.z ^ sign, x.w ^ sign};
      if (rows_.chunk == 0) notes[r].factor = score_factor(task_, tile_, unit);
    }
  }

  const PrefillTask& task_;
  const RowTile& tile_;
  char* queries_;
  int consumer_;
  const Rows rows_;
};

// Writes a warp's 16 finished rows, which lie in shared memory in the output's dtype.
template <class Shape>
__device__ __forceinline__ void write_consumer_rows(const PrefillTask& task, const RowTile& tile, int consumer,
                                                    const char* finished) {
  using Rows = WarpRows<Shape::kHeadDim / 8>;
  const Rows rows;
  auto* own = address_of_row<uint16_t>(task, task.out, tile, kRowsPerConsumer * consumer + rows.addressed_row());
  const auto read = [&](int r) {
    return *reinterpret_cast<const uint4*>(finished + operand_offset<kRowsPerConsumer>(r, rows.chunk));
  };
  const auto is_live = [&](int r) { return kRowsPerConsumer * consumer + r < tile.num_rows && 8 * rows.chunk < task.head_dim; };
  if (task.can_copy_rows) {
#pragma unroll 8
    for (int i = 0; i < Rows::kSteps; ++i) {
      uint16_t* to = rows.ask(own, i) + 8 * rows.chunk;
      const uint4 x = read(rows.row(i));
      if (is_live(rows.row(i))) *reinterpret_cast<uint4*>(to) = x;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < Rows::kSteps; ++i) {
      uint16_t* to = rows.ask(own, i) + 8 * rows.chunk;
      const uint4 x = read(rows.row(i));
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
      if (is_live(rows.row(i)))
#pragma unroll
        for (int j = 0; j < 8; ++j) to[j] = static_cast<uint16_t>(words[j / 2] >> j % 2 * 16);
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
