// The public operations: validate, find the backend, choose a kernel, run. No kernel is named here.
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/fail.h"
#include "core/validate.h"

namespace quantattn {
namespace {

constexpr std::string_view kDecode = "decode_attention", kPrefill = "prefill_attention", kHybrid = "hybrid_attention";

// A miss says what was asked for and what this build or machine has.
template <class Kernel, class Format>
[[noreturn]] void fail_no_kernel(std::span<const Kernel> kernels, Format format, std::string_view format_kind, int head_dim,
                                 const Execution& execution, std::string_view who) {
  std::string variants;
  std::string_view previous;
  for (const Kernel& kernel : kernels) {
    if (kernel.format != format || !kernel.runs_here() || kernel.variant == previous) continue;
    previous = kernel.variant;
    variants += (variants.empty() ? "" : "; ") + std::string(kernel.variant) + ": multiples of " +
                std::to_string(kernel.head_dim_multiple) + " from " + std::to_string(kernel.min_head_dim) + " to " +
                std::to_string(kernel.max_head_dim);
  }
  const std::string forced = execution.kernel.empty() ? "" : " with kernel " + std::string(execution.kernel);
  fail<Unsupported>(who, ": no kernel for head_dim ", head_dim, " and ", format_kind, " ", name(format), forced,
                    "; this build and machine have head_dim in {", variants.empty() ? "nothing for this format" : variants,
                    "}");
}

// Rows that serve a shape, run here and have the variant that the caller forced, if any.
template <class Kernel>
struct Candidates {
  static constexpr size_t kMax = 16;  // variants of one backend that can serve one shape
  const Kernel* rows[kMax];
  size_t count = 0;
};

// At least one, or an exception.
template <class Kernel, class Format>
Candidates<Kernel> find_candidates(std::span<const Kernel> kernels, Format format, std::string_view format_kind, int head_dim,
                                   const Execution& execution, std::string_view who) {
  Candidates<Kernel> found;
  for (const Kernel& kernel : kernels)
    if (found.count < found.kMax && kernel.serves(format, head_dim) &&
        (execution.kernel.empty() || execution.kernel == kernel.variant) && kernel.runs_here())
      found.rows[found.count++] = &kernel;
  if (found.count == 0) fail_no_kernel(kernels, format, format_kind, head_dim, execution, who);
  return found;
}

// Not every backend has every operation.
template <class Function>
void require_operation(Function* function, std::string_view who) {
  if (!function)
    fail<Unsupported>(who, ": this build must have kernels for it on the tensors' device, got none; move them to another");
}

void require_scratch(int64_t bytes, const void* scratch, std::string_view which, std::string_view who) {
  require(bytes == 0 || scratch != nullptr, who, ": ", which, " must hold ", bytes, " bytes, got a null pointer");
}

}  // namespace

DecodePlan plan_decode_attention(const DecodeParams& params, const Execution& execution) {
  const Backend& backend = backend_of(execution.device.kind, kDecode);
  validate(params, execution);
  const auto found =
      find_candidates(backend.decode_kernels(), params.cache.format, "kv_format", params.cache.head_dim, execution, kDecode);
  return backend.plan_decode(params, execution, {found.rows, found.count});
}

void decode_attention(const DecodeParams& params, const Execution& execution, const DecodePlan& plan, Workspace workspace) {
  require(plan.kernel != nullptr, kDecode, ": plan must come from plan_decode_attention, got an empty one");
  require_scratch(plan.workspace_bytes, workspace.scratch, "workspace.scratch", kDecode);
  require_scratch(plan.counter_bytes, workspace.counters, "workspace.counters", kDecode);
  if (params.batch_size == 0) return;
  plan.kernel->run(params, execution, plan, workspace);
}

PrefillPlan plan_prefill_attention(const PrefillParams& params, const Execution& execution) {
  const Backend& backend = backend_of(execution.device.kind, kPrefill);
  require_operation(backend.plan_prefill, kPrefill);
  validate(params, execution);
  find_candidates(backend.prefill_kernels(), params.dtype, "dtype", params.head_dim, execution, kPrefill);
  return backend.plan_prefill(params, execution);
}

void prefill_attention(const PrefillParams& params, const Execution& execution, const PrefillPlan& plan, void* scratch) {
  require(!plan.backend.empty(), kPrefill, ": plan must come from plan_prefill_attention, got an empty one");
  require_scratch(plan.workspace_bytes, scratch, "scratch", kPrefill);
  if (params.num_q_tokens == 0) return;
  backend_of(execution.device.kind, kPrefill).run_prefill(params, execution, plan, scratch);
}

HybridPlan plan_hybrid_attention(const HybridParams& params, const Execution& execution) {
  const Backend& backend = backend_of(execution.device.kind, kHybrid);
  require_operation(backend.plan_hybrid, kHybrid);
  validate(params, execution);
  find_candidates(backend.decode_kernels(), params.cache.format, "kv_format", params.cache.head_dim, execution, kHybrid);
  return backend.plan_hybrid(params, execution);
}

void hybrid_attention(const HybridParams& params, const Execution& execution, const HybridPlan& plan, Workspace workspace) {
  require(!plan.backend.empty(), kHybrid, ": plan must come from plan_hybrid_attention, got an empty one");
  require_scratch(plan.workspace_bytes, workspace.scratch, "workspace.scratch", kHybrid);
  require_scratch(plan.counter_bytes, workspace.counters, "workspace.counters", kHybrid);
  if (params.num_q_tokens == 0) return;
  backend_of(execution.device.kind, kHybrid).run_hybrid(params, execution, plan, workspace);
}

void quantize_kv(const CodecParams& params, const Execution& execution) {
  validate(params, "quantize_kv");
  backend_of(execution.device.kind, "quantize_kv").quantize(params, execution);
}

void dequantize_kv(const CodecParams& params, const Execution& execution) {
  validate(params, "dequantize_kv");
  backend_of(execution.device.kind, "dequantize_kv").dequantize(params, execution);
}

void append_kv(const AppendParams& params, const Execution& execution) {
  validate(params, execution);
  backend_of(execution.device.kind, "append_kv").append(params, execution);
}

void merge_states(const MergeParams& params, const Execution& execution) {
  validate(params);
  backend_of(execution.device.kind, "merge_states").merge(params, execution);
}

}  // namespace quantattn
