#pragma once

#include "cpu/simd.h"
#include "cpu/stages.h"

// Joins the results of the parts of one sequence by their maxima and sums, in the order of the parts.
namespace quantattn::cpu::QATTN_ISA {

// What the parts [first, first + kLanes) count for; zero past the last.
QATTN_INLINE F32 weights_of_parts(const JoinJob& job, int64_t row, int64_t first, float base) {
  float max[kLanes];
  for (int i = 0; i < kLanes; ++i)
    max[i] = first + i < job.num_parts ? job.first.max[(first + i) * job.part_stride + row] : -__builtin_inff();
  return exp_nonpositive(load(max) - base);
}

inline void join_parts(const JoinJob& job) {
  const PartialResult& total = job.first;
  for (int64_t row = 0; row < job.num_rows; ++row) {
    float max = total.max[row];
    for (int64_t part = 1; part < job.num_parts; ++part) {
      const float part_max = total.max[part * job.part_stride + row];
      max = part_max > max ? part_max : max;
    }
    // Nothing visible to any part: (-inf) - (-inf) would be NaN, and would hide the NaN of a sum that is one.
    const float base = max == -__builtin_inff() ? 0.f : max;
    float sum = 0.f;
    float* out = total.out + row * job.row_stride;
    for (int64_t first = 0; first < job.num_parts; first += kLanes) {
      const int64_t count = job.num_parts - first < kLanes ? job.num_parts - first : kLanes;
      float weights[kLanes];
      store(weights, weights_of_parts(job, row, first, base));
      for (int64_t part = 0; part < count; ++part) sum += weights[part] * total.sum[(first + part) * job.part_stride + row];
      for (int64_t i = 0; i < job.row_stride; i += kLanes) {
        F32 joined = first == 0 ? F32{} : load(out + i);
        for (int64_t part = 0; part < count; ++part) joined += weights[part] * load(out + (first + part) * job.part_stride + i);
        store(out + i, joined);
      }
    }
    total.sum[row] = sum;
    total.max[row] = max;
  }
}

}  // namespace quantattn::cpu::QATTN_ISA
