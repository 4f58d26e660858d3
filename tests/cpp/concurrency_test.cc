// Several threads at once, several thread counts: the same bits.
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "problem.h"

using namespace quantattn;
using namespace quantattn_test;

namespace {

Shape shape_of(int index) {
  const KvFormat formats[] = {KvFormat::kInt8, KvFormat::kFp16, KvFormat::kFp8E4M3, KvFormat::kBf16};
  const KvFormat format = formats[index % 4];
  return {.format = {format, format},
          .seq_lens = {300 + 50 * index, 0, 17},
          .num_kv_heads = 1 + index % 3,
          .group = 1 + index,
          .seed = static_cast<uint32_t>(index + 1)};
}

void threads_do_not_disturb_each_other() {
  constexpr int kThreads = 6, kRounds = 12;
  std::vector<std::thread> threads;
  for (int index = 0; index < kThreads; ++index)
    threads.emplace_back([index] {
      Problem problem(shape_of(index));
      const Execution execution = {.num_threads = 1 + index % 3};
      problem.check(execution);
      const std::vector<float> first = problem.out;
      for (int round = 0; round < kRounds; ++round) {
        problem.run(execution);
        CHECK(problem.out == first, "thread ", index, " round ", round);
      }
    });
  for (std::thread& thread : threads) thread.join();
}

// One cache, many readers.
void threads_may_share_a_cache() {
  Problem owner(shape_of(0));
  owner.run();
  std::vector<std::thread> threads;
  for (int index = 0; index < 4; ++index)
    threads.emplace_back([&owner] {
      DecodeParams params = owner.params;
      std::vector<float> out(owner.out.size()), lse(owner.lse.size());
      params.out.data = out.data();
      params.lse = lse.data();
      const DecodePlan plan = plan_decode_attention(params, {.num_threads = 2});
      std::vector<std::max_align_t> scratch(static_cast<size_t>(plan.workspace_bytes) / sizeof(std::max_align_t) + 32);
      void* data = scratch.data();
      size_t space = scratch.size() * sizeof(std::max_align_t);
      decode_attention(params, {.num_threads = 2}, plan,
                       {std::align(256, static_cast<size_t>(plan.workspace_bytes), data, space), nullptr});
      CHECK(out.size() == owner.out.size() && std::abs(out[0] - owner.out[0]) < 1e-3f, out[0], " and ", owner.out[0]);
    });
  for (std::thread& thread : threads) thread.join();
}

void batch_invariant_results_do_not_depend_on_the_thread_count() {
  for (int index = 0; index < 4; ++index) {
    Problem problem(shape_of(index));
    problem.params.batch_invariant = true;
    problem.run({.num_threads = 1});
    const std::vector<float> first = problem.out, first_lse = problem.lse;
    for (int num_threads : {2, 3, 8}) {
      problem.run({.num_threads = num_threads});
      CHECK(problem.out == first && problem.lse == first_lse, "threads ", num_threads, " problem ", index);
    }
  }
}

}  // namespace

int main() {
  threads_do_not_disturb_each_other();
  threads_may_share_a_cache();
  batch_invariant_results_do_not_depend_on_the_thread_count();
  return finish("concurrency_test");
}
