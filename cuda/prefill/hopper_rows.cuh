#pragma once

#include "prefill/hopper_shape.cuh"
#include "prefill/query_chunk.cuh"

// A consumer's rows of queries on their way in, and of the output on their way out.
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

}  // namespace quantattn::cuda
