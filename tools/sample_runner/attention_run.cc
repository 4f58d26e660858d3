#include "attention_run.h"

#include "number_types.h"

namespace sample_runner {
namespace {

struct TimedCall {
  const AttentionCall* call;
  std::vector<double>* times_ms;
};

// In turn, so that a machine that slows down slows all of them down.
void time_calls(std::span<const TimedCall> calls, const Options& options, DeviceMemory& memory) {
  Buffer flushed(memory, static_cast<size_t>(options.flush_mib) << 20, 0);
  for (const TimedCall& timed : calls)
    for (int i = 0; i < options.warmup_iterations; ++i) timed.call->run();
  for (int i = 0; i < options.profiling_iterations; ++i)
    for (const TimedCall& timed : calls) {
      memory.fill(flushed.as<void>(), static_cast<unsigned char>(i), flushed.size());
      timed.times_ms->push_back(memory.time_ms([&] { timed.call->run(); }));
    }
}

// `whole` and, timed beside it, calls for parts of the batch.
AttentionResult measure(const Problem& p, const AttentionCall& whole, std::span<const TimedCall> parts, const Options& options,
                        DeviceMemory& memory) {
  whole.run();
  const std::vector<std::byte> first_out = whole.out().read<std::byte>(), first_lse = whole.lse().read<std::byte>();
  AttentionResult result;
  std::vector<TimedCall> calls{{&whole, &result.step_ms}};
  calls.insert(calls.end(), parts.begin(), parts.end());
  time_calls(calls, options, memory);
  const std::vector<std::byte> out = whole.out().read<std::byte>();
  result.lse = whole.lse().read<float>();
  result.is_reproducible = out == first_out && whole.lse().read<std::byte>() == first_lse;
  result.out.reserve(static_cast<size_t>(p.num_q_rows() * p.head_dim));
  for (int64_t i = 0; i < p.num_q_rows() * p.head_dim; ++i) result.out.push_back(decode(p.q_dtype, out.data(), i));
  result.plan = whole.plan();
  return result;
}

AttentionResult run_hybrid(const Problem& p, const Cache& cache, const Options& options, DeviceMemory& memory) {
  const auto whole = plan_hybrid(p, cache, all_sequences(p), options, memory);
  const std::vector<int> prefills = sequences_of_kind(p, true), decodes = sequences_of_kind(p, false);
  PartTimes times;
  std::vector<std::unique_ptr<AttentionCall>> calls;
  std::vector<TimedCall> timed;
  if (!prefills.empty()) {
    calls.push_back(plan_hybrid(p, cache, prefills, options, memory));
    timed.push_back({calls.back().get(), &times.prefill_ms});
  }
  if (!decodes.empty()) {
    calls.push_back(plan_decode(p, cache, decodes, options, memory));
    timed.push_back({calls.back().get(), &times.decode_ms});
  }
  AttentionResult result = measure(p, *whole, timed, options, memory);
  result.parts = std::move(times);
  return result;
}

}  // namespace

AttentionResult run_over_cache(const Problem& p, const Cache& cache, const Options& options, DeviceMemory& memory) {
  if (options.mode == Mode::kHybrid) return run_hybrid(p, cache, options, memory);
  const auto plan = options.mode == Mode::kDecode ? plan_decode : plan_hybrid;
  return measure(p, *plan(p, cache, all_sequences(p), options, memory), {}, options, memory);
}

AttentionResult run_over_fresh(const Problem& p, const FreshKv& kv, const Options& options, DeviceMemory& memory) {
  return measure(p, *plan_prefill(p, kv, options, memory), {}, options, memory);
}

std::vector<int> sequences_of_kind(const Problem& p, bool is_prefill) {
  std::vector<int> sequences;
  for (int b = 0; b < p.batch_size; ++b)
    if (p.is_prefill[static_cast<size_t>(b)] == is_prefill) sequences.push_back(b);
  return sequences;
}

}  // namespace sample_runner
