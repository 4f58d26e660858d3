// hybrid_attention against the float64 reference and against separate calls, on every variant that this machine runs.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "ragged_problem.h"

using namespace quantattn;
using namespace quantattn_test;

namespace {

void check_on_every_variant(const RaggedShape& shape, int num_splits = 0, bool batch_invariant = false) {
  HybridProblem problem(shape);
  problem.params.num_splits = num_splits;
  problem.params.batch_invariant = batch_invariant;
  for (const std::string& variant : cpu_variants()) problem.check({.num_threads = 2, .kernel = variant});
}

void every_pair_and_granularity() {
  for (KvPair pair : kv_pairs()) {
    for (auto granularity : {ScaleGranularity::kTokenHead, ScaleGranularity::kHead, ScaleGranularity::kTensor})
      check_on_every_variant(
          {.num_q_tokens = {40, 0, 3, 1}, .num_keys = {40, 7, 70, 130}, .format = pair, .granularity = granularity});
    check_on_every_variant(
        {.num_q_tokens = {40, 0, 3, 1}, .num_keys = {40, 7, 70, 130}, .format = pair, .has_sinks = true, .has_offset = true});
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
                              .has_starts = true,
                              .has_offset = true});
  }
}

void every_head_dim() {
  for (int head_dim = 32; head_dim <= 256; head_dim += 8)
    for (KvFormat format : {KvFormat::kBf16, KvFormat::kInt8, KvFormat::kFp8E4M3})
      check_on_every_variant(
          {.num_q_tokens = {18, 1}, .num_keys = {25, 33}, .format = {format, format}, .num_kv_heads = 1, .head_dim = head_dim});
}

void random_shapes() {
  for (uint32_t seed = 1; seed <= 40; ++seed) check_on_every_variant(random_ragged_shape(seed));
}

void splits() {
  const RaggedShape shape = {.num_q_tokens = {1, 40, 16, 0}, .num_keys = {1500, 300, 200, 9}, .has_sinks = true};
  for (int num_splits : {1, 3, 64}) check_on_every_variant(shape, num_splits);
  check_on_every_variant(shape, 0, true);
}

// More keys than one float32 sum may run over, for many query tokens and for few.
void long_sequences() {
  for (KvFormat format : {KvFormat::kFp16, KvFormat::kInt8})
    check_on_every_variant({.num_q_tokens = {20, 2},
                            .num_keys = {8300, 8250},
                            .format = {format, format},
                            .num_kv_heads = 1,
                            .group = 1,
                            .head_dim = 32});
}

void batch_invariant_results_do_not_depend_on_threads_or_batch() {
  for (KvPair pair : kv_pairs()) {
    HybridProblem problem({.num_q_tokens = {200, 3, 33, 1}, .num_keys = {250, 2500, 300, 1100}, .format = pair});
    problem.params.batch_invariant = true;
    problem.run({.num_threads = 1});
    const std::vector<uint8_t> out = problem.out_bytes;
    const std::vector<float> lse = problem.lse;
    for (int num_threads : {2, 5}) {
      problem.run({.num_threads = num_threads});
      CHECK(problem.out_bytes == out && problem.lse == lse, "threads ", num_threads, ", ", name(pair));
    }
    problem.params.batch_size = 2;
    problem.params.num_q_tokens = 203;
    problem.run({.num_threads = 2});
    const auto bytes = problem.params.out.token_stride * 203 * 4;
    CHECK(std::equal(out.begin(), out.begin() + bytes, problem.out_bytes.begin()), "smaller batch, ", name(pair));
  }
}

// Few query tokens are decode's: the same bits.
void decoding_sequences_equal_decode_attention() {
  for (KvPair pair : kv_pairs()) {
    HybridProblem problem({.num_q_tokens = {4, 4, 4}, .num_keys = {3, 300, 1200}, .format = pair, .has_sinks = true});
    problem.params.batch_invariant = true;
    problem.run({.num_threads = 2});
    const std::vector<float> lse = problem.lse;
    std::vector<uint8_t> out(problem.out_bytes.size(), 0xFF);
    const HybridParams& hybrid = problem.params;
    DecodeParams decode;
    decode.q = hybrid.q;
    decode.q.outer_stride = 4 * hybrid.q.token_stride;
    decode.out = decode.q;
    decode.out.data = out.data();
    decode.lse = problem.lse.data();
    decode.batch_size = hybrid.batch_size;
    decode.num_q_tokens = 4;
    decode.num_q_heads = hybrid.num_q_heads;
    decode.cache = hybrid.cache;
    decode.page_table = hybrid.page_table;
    decode.max_pages = hybrid.max_pages;
    decode.seq_lens = hybrid.seq_lens;
    decode.sm_scale = hybrid.sm_scale;
    decode.sinks = hybrid.sinks;
    decode.batch_invariant = true;
    const DecodePlan plan = plan_decode_attention(decode, {});
    std::vector<char> scratch(static_cast<size_t>(plan.workspace_bytes) + 256);
    void* start = scratch.data() + (256 - reinterpret_cast<uintptr_t>(scratch.data()) % 256);
    decode_attention(decode, {}, plan, {start, nullptr});
    CHECK(out == problem.out_bytes && lse == problem.lse, name(pair));
  }
}

// A prompt in chunks over the cache gives what it gives as a whole.
void chunks_equal_the_whole() {
  for (KvPair pair : kv_pairs()) {
    HybridProblem problem({.num_q_tokens = {130}, .num_keys = {130}, .format = pair});
    problem.run();
    const std::vector<uint8_t> whole = problem.out_bytes;
    const std::vector<float> whole_lse = problem.lse;
    for (int chunk : {1, 7, 16, 64}) {
      HybridParams params = problem.params;
      for (int first = 0; first < 130; first += chunk) {
        const int32_t cu_seqlens_q[] = {0, std::min(chunk, 130 - first)}, seq_len = first + cu_seqlens_q[1];
        params.num_q_tokens = cu_seqlens_q[1];
        params.cu_seqlens_q = {cu_seqlens_q};
        params.seq_lens = {&seq_len};
        params.q.data = problem.params.q.at<float>(0, first, 0);
        params.out.data = problem.params.out.at<float>(0, first, 0);
        params.lse = problem.lse.data() + first * params.num_q_heads;
        problem.run_params(params, {});
      }
      float difference = 0.f;
      for (size_t i = 0; i < whole_lse.size(); ++i) difference = std::max(difference, std::abs(problem.lse[i] - whole_lse[i]));
      for (int64_t i = 0; i < 130 * params.out.token_stride; ++i) {
        const float a = reinterpret_cast<const float*>(whole.data())[i];
        const float b = reinterpret_cast<const float*>(problem.out_bytes.data())[i];
        if (a == a) difference = std::max(difference, std::abs(a - b));  // gaps are NaN
      }
      CHECK(difference < 2e-3f, difference, " with chunks of ", chunk, ", ", name(pair));
    }
  }
}

// A token that NaN codes and scales follow has the same bits as before.
void later_keys_do_not_matter() {
  for (const std::string& variant : cpu_variants())
    for (KvPair pair : kv_pairs()) {
      HybridProblem problem({.num_q_tokens = {100}, .num_keys = {100}, .format = pair, .page_size = 128});
      const Execution execution = {.kernel = variant};
      problem.run(execution);
      const std::vector<uint8_t> before = problem.out_bytes;
      const KvCacheView& cache = problem.params.cache;
      const auto poison = [](void* data, int64_t first, int64_t element_bytes, int64_t count) {
        std::memset(static_cast<char*>(data) + first * element_bytes, 0xFF, static_cast<size_t>(count * element_bytes));
      };
      for (int64_t j = 60; j < 100; ++j) {
        const int64_t page = problem.params.page_table.at(0, 0);
        poison(cache.k_codes.data, cache.k_codes.offset(page, j, 0), code_bytes(pair.k), cache.k_codes.token_stride);
        poison(cache.v_codes.data, cache.v_codes.offset(page, j, 0), code_bytes(pair.v), cache.v_codes.token_stride);
        for (const ScaleView* scale : {&cache.k_scale, &cache.v_scale})
          if (scale->data) poison(scale->data, scale->offset(page, j, 0), 2, scale->token_stride);
      }
      problem.run(execution);
      const int64_t seen_bytes = 60 * problem.params.out.token_stride * 4;
      CHECK(std::equal(before.begin(), before.begin() + seen_bytes, problem.out_bytes.begin()), name(pair), " on ", variant);
      CHECK(!std::equal(before.begin(), before.end(), problem.out_bytes.begin()), "nothing was poisoned, ", name(pair));
    }
}

}  // namespace

int main() {
  every_pair_and_granularity();
  every_head_dim();
  random_shapes();
  splits();
  long_sequences();
  batch_invariant_results_do_not_depend_on_threads_or_batch();
  decoding_sequences_equal_decode_attention();
  chunks_equal_the_whole();
  later_keys_do_not_matter();
  return finish("hybrid_test");
}
