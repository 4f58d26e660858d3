// prefill_attention against the float64 reference, on every variant that this machine runs.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "ragged_problem.h"

using namespace quantattn;
using namespace quantattn_test;

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

void check_on_every_variant(const RaggedShape& shape) {
  PrefillProblem problem(shape);
  for (const std::string& variant : cpu_variants()) problem.check({.num_threads = 2, .kernel = variant});
}

void every_dtype_and_mask() {
  for (DType dtype : kDTypes)
    for (bool causal : {true, false})
      for (int window : {0, 1, 50}) {
        RaggedShape shape = {.num_q_tokens = {40, 0, 3, 1, 70}, .num_keys = {40, 7, 70, 0, 130}, .dtype = dtype};
        shape.causal = causal;
        shape.sliding_window = window;
        check_on_every_variant(shape);
        shape.logits_soft_cap = 5.f;
        shape.has_alibi = shape.has_sinks = shape.has_starts = true;
        check_on_every_variant(shape);
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

void random_shapes() {
  for (uint32_t seed = 1; seed <= 40; ++seed) check_on_every_variant(random_ragged_shape(seed));
}

// More keys than one float32 sum may run over.
void long_sequences() {
  check_on_every_variant({.num_q_tokens = {20, 2}, .num_keys = {8300, 8250}, .num_kv_heads = 1, .group = 1, .head_dim = 32});
}

void results_do_not_depend_on_threads_or_batch() {
  for (DType dtype : kDTypes) {
    PrefillProblem problem({.num_q_tokens = {250, 3, 33}, .num_keys = {250, 1500, 300}, .dtype = dtype, .has_sinks = true});
    problem.run({.num_threads = 1});
    const std::vector<uint8_t> out = problem.out_bytes;
    const std::vector<float> lse = problem.lse;
    for (int num_threads : {2, 5}) {
      problem.run({.num_threads = num_threads});
      CHECK(problem.out_bytes == out && problem.lse == lse, "threads ", num_threads, ", ", name(dtype));
    }
    problem.params.batch_size = 1;
    problem.params.num_q_tokens = problem.params.num_k_tokens = 250;
    problem.run({.num_threads = 2});
    const auto first_bytes = static_cast<size_t>(problem.params.out.token_stride * 250 * bytes_of(dtype));
    CHECK(std::equal(out.begin(), out.begin() + static_cast<int64_t>(first_bytes), problem.out_bytes.begin()),
          "alone or in a batch, ", name(dtype));
  }
}

// A token that NaN keys and values follow, or that they precede out of its window's reach, has the same bits as before.
void unseen_keys_do_not_matter() {
  for (const std::string& variant : cpu_variants())
    for (DType dtype : kDTypes) {
      PrefillProblem problem({.num_q_tokens = {100}, .num_keys = {100}, .dtype = dtype, .sliding_window = 30});
      const Execution execution = {.kernel = variant};
      problem.run(execution);
      const std::vector<uint8_t> before = problem.out_bytes;
      for (const VectorArray* array : {&problem.params.k, &problem.params.v})
        for (int64_t j : {3, 60, 61, 99}) {
          char* row = static_cast<char*>(array->data) + array->offset(0, j, 0) * bytes_of(dtype);
          std::memset(row, 0xFF, static_cast<size_t>(array->token_stride * bytes_of(dtype)));
        }
      problem.run(execution);
      const int64_t token_bytes = problem.params.out.token_stride * bytes_of(dtype);
      for (int64_t i = 0; i < 100; ++i) {
        const bool sees_poison = (i >= 3 && i < 33) || (i >= 60 && i < 91) || i == 99;
        const bool is_equal = std::equal(before.begin() + i * token_bytes, before.begin() + (i + 1) * token_bytes,
                                         problem.out_bytes.begin() + i * token_bytes);
        CHECK(is_equal != sees_poison, "query token ", i, " of ", name(dtype), " on ", variant);
      }
    }
}

}  // namespace

int main() {
  every_dtype_and_mask();
  more_queries_than_keys();
  every_head_dim();
  groups_and_lengths();
  random_shapes();
  long_sequences();
  results_do_not_depend_on_threads_or_batch();
  unseen_keys_do_not_matter();
  return finish("prefill_test");
}
