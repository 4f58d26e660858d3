#pragma once

#include "cpu/product.h"

// Queries, weights and unpacked codes in float32: right for every format.
namespace quantattn::cpu::QATTN_ISA {

struct Float32Product {
  using Sum = F32;
  QATTN_INLINE void add(Sum& sum, const char* a, const char* b) {
    sum += *reinterpret_cast<const float*>(a) * load(reinterpret_cast<const float*>(b));
  }
};

inline int64_t float32_query_row_bytes(int head_dim) { return int64_t{head_dim} * 4; }

inline void float32_score(const ScoreJob& job) {
  const int num_vectors = round_up(job.num_tokens, kLanes) / kLanes;
  multiply(Float32Product{}, job.queries, float32_query_row_bytes(job.head_dim), job.num_rows, *job.keys, num_vectors,
           job.head_dim, [&](int row, int vector, F32 dot) __attribute__((always_inline)) {
             const int token = vector * kLanes;
             store(job.scores + row * kTileTokens + token, dot * job.keys->unit * load(job.key_scales + token));
           });
}

inline void float32_accumulate(const AccumulateJob& job) {
  const int num_vectors = round_up(job.head_dim, kLanes) / kLanes;
  multiply(Float32Product{}, job.weights, kTileTokens * 4, job.num_rows, *job.values, num_vectors, job.num_tokens,
           [&](int row, int vector, F32 sum) __attribute__((always_inline)) {
             float* out = job.out + int64_t{row} * job.row_stride + vector * kLanes;
             store(out, load(out) * job.rescale[row] + sum * job.values->unit);
           });
}

inline constexpr ArithmeticStages kFloat32Stages = {float32_query_row_bytes, nullptr, float32_score, float32_accumulate};

}  // namespace quantattn::cpu::QATTN_ISA
