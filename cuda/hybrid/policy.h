#pragma once

#include "quantattn/hybrid.h"

namespace quantattn::cuda {

// Sequences with more query tokens than this are computed by the prefill kernels, where there are some for the batch.
inline constexpr int kMostDecodedTokens = kMaxDecodeTokens;

// Whether all sequences may have equally many query tokens, few enough for the decoding kernel: if so, it is likely.
constexpr bool has_equal_guess(const HybridParams& params) {
  return params.num_q_tokens % params.batch_size == 0 && params.num_q_tokens / params.batch_size <= kMostDecodedTokens;
}

// Query tokens that the decoding kernel's row tile is chosen for: what every sequence has if all have equally many, else one,
// as in a batch of prompts and of sequences that decode. A batch-invariant result must not depend on such a guess.
constexpr int guess_tokens(const HybridParams& params) {
  return has_equal_guess(params) && !params.batch_invariant ? static_cast<int>(params.num_q_tokens / params.batch_size) : 1;
}

}  // namespace quantattn::cuda
