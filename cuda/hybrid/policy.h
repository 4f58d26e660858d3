#pragma once

#include "quantattn/hybrid.h"

namespace quantattn::cuda {

// Sequences with more query tokens than this are computed by the prefill kernels, where there are some for the batch.
inline constexpr int kMostDecodedTokens = kMaxDecodeTokens;

// Query tokens that the decoding kernel's row tile is chosen for: what every sequence has if all have equally many, else one,
// as in a batch of prompts and of sequences that decode. A batch-invariant result must not depend on such a guess.
constexpr int guess_tokens(const HybridParams& params) {
  const int64_t each = params.num_q_tokens / params.batch_size;
  const bool is_even = each * params.batch_size == params.num_q_tokens;
  return is_even && each <= kMostDecodedTokens && !params.batch_invariant ? static_cast<int>(each) : 1;
}

}  // namespace quantattn::cuda
