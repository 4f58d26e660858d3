#pragma once

#include <functional>
#include <vector>

#include "problem.h"

namespace sample_runner {

// Attention in float64, straight from its definition: no blocks, no splits, no running maximum.
struct ReferenceResult {
  std::vector<double> out;        // [T, Hq, D]
  std::vector<double> magnitude;  // [T, Hq, D]: sum_j p_j |v_j|, the size of the terms that were added
  std::vector<double> lse;        // [T, Hq]
};

// Fills `k` and `v` with the [length, D] rows of one sequence and KV head. Called from several threads.
using KvReader = std::function<void(int b, int head, int64_t length, std::vector<double>& k, std::vector<double>& v)>;

ReferenceResult attend_in_float64(const Problem& problem, const KvReader& read_kv);

}  // namespace sample_runner
