// Host side of prefill: which kernel, which grid. Reads host values only.
#include <algorithm>
#include <vector>

#include "core/fail.h"
#include "decode/decode_launch.h"
#include "launch.h"
#include "prefill/hopper_instances.h"
#include "prefill/instances.h"

namespace quantattn::cuda {

// generated/cuda_pairs.def has one row QATTN_CUDA_PAIR(table) for each pair of formats.
#define QATTN_CUDA_PAIR(table) const PairPrefill& prefill_##table();
#include "generated/cuda_pairs.def"
#undef QATTN_CUDA_PAIR

std::span<const PairPrefill* const> all_prefill_pairs() {
  static const std::vector<const PairPrefill*> pairs = {
#define QATTN_CUDA_PAIR(table) &prefill_##table(),
#include "generated/cuda_pairs.def"
#undef QATTN_CUDA_PAIR
  };
  return pairs;
}

namespace {

constexpr std::string_view kPrefill = "prefill_attention", kHybrid = "hybrid_attention";

// The first kernel that holds head_dim and fits the GPU.
const PrefillInstance& find_instance(KvPair format, int head_dim, const Execution& execution, std::string_view who) {
  constexpr int kStaticBytes = 1024;  // shared memory that a kernel has beside the dynamic part, at most
  const int most_bytes = device_limits(execution.device.index, who).shared_bytes_per_block;
  for (const PairPrefill* pair : all_prefill_pairs())
    if (pair->format == format)
      for (const PrefillInstance& instance : pair->instances)
        if (instance.head_dim >= head_dim && instance.shared_bytes + kStaticBytes <= most_bytes) return instance;
  fail<Unsupported>(who, ": the GPU must have 99 KiB of shared memory for a block, got ", most_bytes / 1024, " KiB");
}

// What both calls have under the same names.
template <class Params>
PrefillTask common_task(const Params& p, DType q_dtype, int head_dim, int num_kv_heads) {
  PrefillTask task = {};
  task.q = p.q;
  task.out = p.out;
  task.lse = p.lse;
  task.q_dtype = q_dtype;
  task.batch_size = p.batch_size;
  task.num_q_heads = p.num_q_heads;
  task.head_dim = head_dim;
  task.num_q_tokens = static_cast<int>(p.num_q_tokens);
  task.group_size = FastDivide(static_cast<uint32_t>(p.num_q_heads / num_kv_heads));
  task.cu_seqlens_q = p.cu_seqlens_q;
  task.seq_starts = p.seq_starts;
  task.causal = p.causal;
  task.sm_scale = p.sm_scale;
  task.alibi_slopes = p.alibi_slopes;
  task.sinks = p.sinks;
  task.sliding_window = p.sliding_window;
  task.logits_soft_cap = p.logits_soft_cap;
  task.can_copy_rows = all_multiples(p.q, 2, head_dim, 16) && all_multiples(p.out, 2, head_dim, 16);
  task.fewest_tokens = 1;
  return task;
}

// Fresh K and V are what a 16-bit cache holds.
KvPair fresh_format(const PrefillParams& p) {
  const KvFormat format = p.dtype == DType::kFloat16 ? KvFormat::kFp16 : KvFormat::kBf16;
  return {format, format};
}

PrefillTask fresh_task(const PrefillParams& p) {
  PrefillTask task = common_task(p, p.dtype, p.head_dim, p.num_kv_heads);
  task.k = code_addresses(p.k, fresh_format(p).k, p.head_dim);
  task.v = code_addresses(p.v, fresh_format(p).v, p.head_dim);
  task.num_pages = 1;
  task.num_k_tokens = static_cast<int>(p.num_k_tokens);
  task.cu_seqlens_k = p.cu_seqlens_k;
  return task;
}

PrefillTask cached_task(const HybridParams& p, int fewest_tokens) {
  PrefillTask task = common_task(p, p.q_dtype, p.cache.head_dim, p.cache.num_kv_heads);
  task.k = code_addresses(p.cache.k_codes, p.cache.format.k, p.cache.head_dim);
  task.v = code_addresses(p.cache.v_codes, p.cache.format.v, p.cache.head_dim);
  task.k_scale = p.cache.k_scale;
  task.v_scale = p.cache.v_scale;
  task.k_offset = p.cache.k_offset;
  task.num_pages = p.cache.num_pages;
  task.seq_lens = p.seq_lens;
  task.page_table = p.page_table;
  task.page_size = FastDivide(static_cast<uint32_t>(p.cache.page_size));
  task.capacity = static_cast<int>(int64_t{p.max_pages} * p.cache.page_size);
  task.fewest_tokens = fewest_tokens;
  return task;
}

// A block for each row tile that the batch may have: its lengths are known on the device alone.
void launch(const PrefillTask& task, const PrefillInstance& instance, int num_kv_heads, const Execution& execution,
            std::string_view who) {
  const int64_t num_rows = int64_t{task.num_q_tokens} * task.group_size.divisor;
  const int64_t num_tiles = num_rows / instance.block_rows + std::min(task.batch_size, task.num_q_tokens / task.fewest_tokens);
  require(num_kv_heads <= 65535, who, ": cache must have at most 65535 KV heads, got ", num_kv_heads);
  require(num_tiles <= INT32_MAX, who, ": q must have at most 2^31 rows per KV head, got ", num_rows);
  if (num_tiles == 0) return;
  const DeviceScope scope(execution.device.index, who);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(instance.entry), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             instance.shared_bytes),
        who, "preparing the prefill kernel");
  launch_dependent(instance.entry, dim3(static_cast<unsigned>(num_tiles), static_cast<unsigned>(num_kv_heads)),
                   instance.threads, instance.shared_bytes, execution, task, who, "launching the prefill kernel");
}

// The call's own wish, else the environment's.
std::string_view forced_variant(const Execution& execution, std::string_view who) {
  return execution.kernel.empty() ? variant_from_environment(execution, who, {kTensorCores, kHopper}) : execution.kernel;
}

std::optional<HopperLaunch> plan_hopper_over_cache(const HybridParams& p, const Execution& execution, int fewest_tokens) {
  if (forced_variant(execution, kHybrid) == kTensorCores) return std::nullopt;
  return plan_hopper(cached_task(p, fewest_tokens), p.cache.format, execution, kHybrid);
}

}  // namespace

std::span<const PrefillKernel> prefill_kernels() {
  static const std::vector<PrefillKernel> kernels = [] {
    std::vector<PrefillKernel> rows;
    for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      rows.push_back({"cuda", kHopper, dtype, 8, 256, 8, &runs_hopper});
      rows.push_back({"cuda", kTensorCores, dtype, 8, 256, 8, &has_usable_device});
    }
    return rows;
  }();
  return kernels;
}

PrefillPlan plan_prefill(const PrefillParams& params, const Execution& execution) {
  const std::string_view forced = forced_variant(execution, kPrefill);
  if (forced != kTensorCores && plan_hopper(fresh_task(params), fresh_format(params), execution, kPrefill))
    return {"cuda", kHopper, 0};
  if (forced == kHopper)
    fail<Unsupported>(kPrefill, ": the ", kHopper,
                      " kernel must have an sm_90 GPU and K and V vectors at multiples of 16 bytes, "
                      "got other ones");
  return {"cuda", kTensorCores, 0};
}

void run_prefill(const PrefillParams& params, const Execution& execution, const PrefillPlan& plan, void*) {
  const PrefillTask task = fresh_task(params);
  const KvPair format = fresh_format(params);
  const auto hopper = plan.variant == kHopper ? plan_hopper(task, format, execution, kPrefill) : std::nullopt;
  if (hopper)
    run_hopper(*hopper, params.num_kv_heads, execution, kPrefill);
  else
    launch(task, find_instance(format, params.head_dim, execution, kPrefill), params.num_kv_heads, execution, kPrefill);
}

// bfloat16 operands keep the accuracy of bfloat16 queries alone.
bool prefill_serves(const HybridParams& params) {
  const KvPair format = params.cache.format;
  const bool has_bf16 = format.k == KvFormat::kBf16 || format.v == KvFormat::kBf16;
  return params.q_dtype == DType::kBFloat16 || (params.q_dtype == DType::kFloat16 && !has_bf16);
}

std::string_view prefill_variant_over_cache(const HybridParams& params, const Execution& execution) {
  return plan_hopper_over_cache(params, execution, 1) ? kHopper : kTensorCores;
}

void run_prefill_over_cache(const HybridParams& params, const Execution& execution, int fewest_tokens) {
  const int num_kv_heads = params.cache.num_kv_heads;
  if (const auto hopper = plan_hopper_over_cache(params, execution, fewest_tokens))
    run_hopper(*hopper, num_kv_heads, execution, kHybrid);
  else
    launch(cached_task(params, fewest_tokens), find_instance(params.cache.format, params.cache.head_dim, execution, kHybrid),
           num_kv_heads, execution, kHybrid);
}

}  // namespace quantattn::cuda
