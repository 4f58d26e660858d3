// hybrid_attention against the float64 reference, on every variant that this machine runs.
#include "check.h"
#include "ragged_problem.h"

using namespace quantattn;
using namespace quantattn_test;

namespace {

void check_on_every_variant(const RaggedShape& shape) {
  HybridProblem problem(shape);
  for (const std::string& variant : cpu_variants()) problem.check({.num_threads = 2, .kernel = variant});
}

void every_pair_and_granularity() {
  for (KvPair pair : kv_pairs()) {
    for (auto granularity : {ScaleGranularity::kTokenHead, ScaleGranularity::kHead, ScaleGranularity::kTensor})
      check_on_every_variant(
          {.num_q_tokens = {40, 0, 3, 1}, .num_keys = {40, 7, 70, 130}, .format = pair, .granularity = granularity});
    for (bool causal : {true, false})
      check_on_every_variant({.num_q_tokens = {70, 2, 0, 33, 90, 5},
                              .num_keys = {70, 90, 5, 130, 31, 0},
                              .format = pair,
                              .group = 3,
                              .sliding_window = 21,
                              .logits_soft_cap = 5.f,
                              .causal = causal,
                              .has_alibi = true,
                              .has_sinks = true,
                              .has_starts = true});
  }
}

void every_head_dim() {
  for (int head_dim = 32; head_dim <= 256; head_dim += 8)
    for (KvFormat format : {KvFormat::kBf16, KvFormat::kInt8, KvFormat::kFp8E4M3})
      check_on_every_variant(
          {.num_q_tokens = {18, 1}, .num_keys = {25, 33}, .format = {format, format}, .num_kv_heads = 1, .head_dim = head_dim});
}

}  // namespace

int main() {
  every_pair_and_granularity();
  every_head_dim();
  return finish("hybrid_test");
}
