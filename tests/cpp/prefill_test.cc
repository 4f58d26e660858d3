// prefill_attention against the float64 reference, on every variant that this machine runs.
#include "check.h"
#include "ragged_problem.h"

using namespace quantattn;
using namespace quantattn_test;

namespace {

void check_on_every_variant(const RaggedShape& shape) {
  PrefillProblem problem(shape);
  for (const std::string& variant : cpu_variants()) problem.check({.num_threads = 2, .kernel = variant});
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

void every_dtype_and_mask() {
  for (DType dtype : kDTypes)
    for (bool causal : {true, false})
      for (int window : {0, 1, 50}) {
        const RaggedShape shape = {.num_q_tokens = {40, 0, 3, 1, 70},
                                   .num_keys = {40, 7, 70, 0, 130},
                                   .dtype = dtype,
                                   .sliding_window = window,
                                   .causal = causal};
        check_on_every_variant(shape);
        RaggedShape all = shape;
        all.logits_soft_cap = 5.f;
        all.has_alibi = all.has_sinks = all.has_starts = true;
        check_on_every_variant(all);
      }
}

void more_queries_than_keys() {
  for (bool causal : {true, false})
    for (bool has_sinks : {false, true})
      check_on_every_variant({.num_q_tokens = {90, 5, 20}, .num_keys = {33, 2, 0}, .causal = causal, .has_sinks = has_sinks});
}

void every_head_dim() {
  for (int head_dim = 32; head_dim <= 256; head_dim += 8)
    for (DType dtype : kDTypes)
      check_on_every_variant(
          {.num_q_tokens = {17, 20}, .num_keys = {17, 33}, .dtype = dtype, .num_kv_heads = 1, .head_dim = head_dim});
}

void groups_and_lengths() {
  for (int group : {1, 3, 5, 8, 12, 71})
    check_on_every_variant({.num_q_tokens = {21, 18}, .num_keys = {21, 66}, .num_kv_heads = 1, .group = group, .head_dim = 32});
  for (int length : {17, 63, 64, 65, 127, 128, 129, 193, 260})
    check_on_every_variant(
        {.num_q_tokens = {length, 33}, .num_keys = {length, length}, .num_kv_heads = 1, .group = 1, .head_dim = 40});
}

}  // namespace

int main() {
  every_dtype_and_mask();
  more_queries_than_keys();
  every_head_dim();
  groups_and_lengths();
  return finish("prefill_test");
}
