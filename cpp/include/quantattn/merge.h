#pragma once

#include "quantattn/api.h"
#include "quantattn/types.h"

namespace quantattn {

// Joins two partial attention results over disjoint key sets by their log-sum-exp (Liu et al., arXiv:2310.01889).
// Shapes: R rows (any leading axes flattened to [outer, token, head]), D = head_dim.
struct MergeParams {
  VectorArray out_a, out_b, out;  // [B, n, H, D], dtype; out may be out_a or out_b itself
  const float* lse_a = nullptr;   // [B, n, H] contiguous, natural log
  const float* lse_b = nullptr;
  float* lse = nullptr;  // may be lse_a or lse_b itself
  DType dtype = DType::kFloat32;
  int64_t batch_size = 0, num_q_tokens = 0;
  int num_q_heads = 0, head_dim = 0;
};

QATTN_API void merge_states(const MergeParams& params, const Execution& execution);

}  // namespace quantattn
