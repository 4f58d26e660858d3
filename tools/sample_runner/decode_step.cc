#include "decode_step.h"

#include "number_types.h"
#include "quantattn/decode.h"

namespace sample_runner {
namespace {

constexpr unsigned char kUnwritten = 0xFF;  // NaN in every output type

// Everything of a call that lives on the device, and the call that uses it.
struct DeviceCall {
  DeviceCall(const Problem& p, const Cache& cache, const Options& options, DeviceMemory& memory)
      : q(Buffer::of<std::byte>(memory, p.q)),
        out(memory, p.q.size(), kUnwritten),
        lse(memory, static_cast<size_t>(p.num_q_rows()) * sizeof(float), kUnwritten),
        seq_lens(Buffer::of<int32_t>(memory, p.seq_lens)),
        seq_starts(Buffer::of<int32_t>(memory, p.seq_starts)),
        alibi_slopes(Buffer::of<float>(memory, p.alibi_slopes)),
        sinks(Buffer::of<float>(memory, p.sinks)) {
    const int64_t head = p.head_dim, token = head * p.num_q_heads, sequence = token * p.num_q_tokens;
    params.q = {q.as<void>(), sequence, token, head};
    params.out = {out.as<void>(), sequence, token, head};
    params.lse = lse.as<float>();
    params.q_dtype = p.q_dtype;
    params.batch_size = p.batch_size;
    params.num_q_tokens = p.num_q_tokens;
    params.num_q_heads = p.num_q_heads;
    params.cache = cache.view();
    params.page_table = cache.page_table();
    params.max_pages = cache.max_pages();
    params.seq_lens.data = seq_lens.as<const int32_t>();
    if (!p.seq_starts.empty()) params.seq_starts.data = seq_starts.as<const int32_t>();
    params.sm_scale = p.sm_scale;
    if (!p.alibi_slopes.empty()) params.alibi_slopes = {alibi_slopes.as<const float>(), p.alibi_row_stride(), 1};
    if (!p.sinks.empty()) params.sinks.data = sinks.as<const float>();
    params.sliding_window = p.sliding_window;
    params.logits_soft_cap = p.logits_soft_cap;
    params.num_splits = options.num_splits;
    params.batch_invariant = options.is_batch_invariant;
  }

  Buffer q, out, lse, seq_lens, seq_starts, alibi_slopes, sinks;
  quantattn::DecodeParams params;
};

}  // namespace

DecodeResult run_decode(const Problem& p, const Cache& cache, const Options& options, DeviceMemory& memory) {
  const DeviceCall call(p, cache, options, memory);
  const quantattn::Execution execution{
      .device = options.device, .stream = nullptr, .num_threads = options.num_threads, .kernel = options.kernel};
  const quantattn::DecodePlan plan = quantattn::plan_decode_attention(call.params, execution);
  const Buffer scratch(memory, static_cast<size_t>(plan.workspace_bytes), kUnwritten);
  const Buffer counters(memory, static_cast<size_t>(plan.counter_bytes), 0);
  const quantattn::Workspace workspace{scratch.as<void>(), counters.as<void>()};
  const auto step = [&] { quantattn::decode_attention(call.params, execution, plan, workspace); };

  step();
  const std::vector<std::byte> first_out = call.out.read<std::byte>(), first_lse = call.lse.read<std::byte>();
  for (int i = 0; i < options.warmup_iterations; ++i) step();
  DecodeResult result;
  Buffer flushed(memory, static_cast<size_t>(options.flush_mib) << 20, 0);
  for (int i = 0; i < options.profiling_iterations; ++i) {
    memory.fill(flushed.as<void>(), static_cast<unsigned char>(i), flushed.size());
    result.step_ms.push_back(memory.time_ms(step));
  }
  const std::vector<std::byte> out = call.out.read<std::byte>();
  result.lse = call.lse.read<float>();
  result.is_reproducible = out == first_out && call.lse.read<std::byte>() == first_lse;
  for (int64_t i = 0; i < p.num_q_rows() * p.head_dim; ++i) result.out.push_back(decode(p.q_dtype, out.data(), i));
  result.backend = plan.backend;
  result.variant = plan.variant;
  result.num_splits = plan.num_splits;
  result.split_size = plan.split_size;
  result.workspace_bytes = plan.workspace_bytes + plan.counter_bytes;
  return result;
}

}  // namespace sample_runner
