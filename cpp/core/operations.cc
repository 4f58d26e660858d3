// The public operations: validate, find the backend, choose a kernel, run. No kernel is named here.
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/fail.h"
#include "core/validate.h"

namespace quantattn {
namespace {

// A miss says what was asked for and what this build or machine has.
[[noreturn]] void fail_no_kernel(const DecodeParams& p, const Execution& execution, std::span<const DecodeKernel> kernels) {
  std::string variants;
  std::string_view previous;
  for (const DecodeKernel& kernel : kernels) {
    if (kernel.format != p.cache.format || !kernel.runs_here() || kernel.variant == previous) continue;
    previous = kernel.variant;
    variants += (variants.empty() ? "" : "; ") + std::string(kernel.variant) + ": multiples of " +
                std::to_string(kernel.head_dim_multiple) + " from " + std::to_string(kernel.min_head_dim) + " to " +
                std::to_string(kernel.max_head_dim);
  }
  const std::string forced = execution.kernel.empty() ? "" : " with kernel " + std::string(execution.kernel);
  fail<Unsupported>("decode_attention: no kernel for head_dim ", p.cache.head_dim, " and kv_format ", name(p.cache.format),
                    forced, "; this build and machine have head_dim in {",
                    variants.empty() ? "nothing for this format" : variants, "}");
}

}  // namespace

DecodePlan plan_decode_attention(const DecodeParams& params, const Execution& execution) {
  const Backend& backend = backend_of(execution.device.kind, "decode_attention");
  validate(params, execution);
  const std::span<const DecodeKernel> kernels = backend.decode_kernels();
  constexpr size_t kMaxCandidates = 16;  // variants of one backend that can serve one shape
  const DecodeKernel* candidates[kMaxCandidates];
  size_t num_candidates = 0;
  for (const DecodeKernel& kernel : kernels)
    if (num_candidates < kMaxCandidates && kernel.serves(params.cache.format, params.cache.head_dim) &&
        (execution.kernel.empty() || execution.kernel == kernel.variant) && kernel.runs_here())
      candidates[num_candidates++] = &kernel;
  if (num_candidates == 0) fail_no_kernel(params, execution, kernels);
  return backend.plan_decode(params, execution, {candidates, num_candidates});
}

void decode_attention(const DecodeParams& params, const Execution& execution, const DecodePlan& plan, Workspace workspace) {
  require(plan.kernel != nullptr, "decode_attention: plan must come from plan_decode_attention, got an empty one");
  require(plan.workspace_bytes == 0 || workspace.scratch != nullptr, "decode_attention: workspace.scratch must hold ",
          plan.workspace_bytes, " bytes, got a null pointer");
  require(plan.counter_bytes == 0 || workspace.counters != nullptr, "decode_attention: workspace.counters must hold ",
          plan.counter_bytes, " zeroed bytes, got a null pointer");
  if (params.batch_size == 0) return;
  plan.kernel->run(params, execution, plan, workspace);
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
