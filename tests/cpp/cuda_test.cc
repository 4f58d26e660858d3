// decode_attention, prefill_attention and hybrid_attention on a GPU against the float64 reference, on every kernel family.
#include <cstdio>
#include <exception>
#include <type_traits>

#include "check.h"
#include "device_copies.h"
#include "ragged_problem.h"

using namespace quantattn;
using namespace quantattn_test;

namespace {

constexpr int kSkipped = 77;  // what CTest takes as such

void move(VectorArray& array, const DeviceCopies& copies) { array.data = copies.at(array.data); }

void move(KvCacheView& cache, const DeviceCopies& copies) {
  move(cache.k_codes, copies);
  move(cache.v_codes, copies);
  cache.k_scale.data = copies.at(static_cast<char*>(cache.k_scale.data));
  cache.v_scale.data = copies.at(static_cast<char*>(cache.v_scale.data));
  cache.k_offset.data = copies.at(cache.k_offset.data);
}

// Every address of a call.
template <class Params>
void move(Params& p, const DeviceCopies& copies) {
  move(p.q, copies);
  move(p.out, copies);
  p.lse = copies.at(p.lse);
  p.seq_starts.data = copies.at(p.seq_starts.data);
  p.alibi_slopes.data = copies.at(p.alibi_slopes.data);
  p.sinks.data = copies.at(p.sinks.data);
  if constexpr (requires { p.cu_seqlens_q; }) p.cu_seqlens_q.data = copies.at(p.cu_seqlens_q.data);
  if constexpr (requires { p.cu_seqlens_k; }) {
    move(p.k, copies);
    move(p.v, copies);
    p.cu_seqlens_k.data = copies.at(p.cu_seqlens_k.data);
  } else {
    move(p.cache, copies);
    p.page_table.data = copies.at(p.page_table.data);
    p.seq_lens.data = copies.at(p.seq_lens.data);
  }
}

// Workspaces of exactly the promised size: NaN, so that reading one shows, and counters of zero.
DecodePlan run(const DecodeParams& params, const Execution& execution, DeviceCopies& copies) {
  const DecodePlan plan = plan_decode_attention(params, execution);
  void* const scratch = copies.allocate(static_cast<size_t>(plan.workspace_bytes), 0xFF);
  decode_attention(params, execution, plan, {scratch, copies.allocate(static_cast<size_t>(plan.counter_bytes), 0)});
  return plan;
}
HybridPlan run(const HybridParams& params, const Execution& execution, DeviceCopies& copies) {
  const HybridPlan plan = plan_hybrid_attention(params, execution);
  void* const scratch = copies.allocate(static_cast<size_t>(plan.workspace_bytes), 0xFF);
  hybrid_attention(params, execution, plan, {scratch, copies.allocate(static_cast<size_t>(plan.counter_bytes), 0)});
  return plan;
}
PrefillPlan run(const PrefillParams& params, const Execution& execution, DeviceCopies& copies) {
  const PrefillPlan plan = plan_prefill_attention(params, execution);
  prefill_attention(params, execution, plan, copies.allocate(static_cast<size_t>(plan.workspace_bytes), 0xFF));
  return plan;
}

// Runs a problem on the GPU and compares what comes back.
template <class AnyProblem>
void check(AnyProblem& problem, std::string_view kernel, double tolerance) {
  problem.clear_outputs();
  DeviceCopies copies;
  problem.for_each_array([&](const auto& array) { copies.add(array); });
  auto params = problem.params;
  move(params, copies);
  const auto plan = run(params, {.device = {DeviceKind::kCuda, 0}, .kernel = kernel}, copies);
  problem.for_each_output([&](auto& array) { copies.fetch(array); });
  CHECK(kernel.empty() || plan.variant == kernel, "forced ", kernel, ", ran ", plan.variant);
  problem.check_result(tolerance, plan.variant);
}

bool is_8bit(KvPair pair) { return info(pair.k).has_scale || info(pair.v).has_scale; }
bool has_bf16(KvPair pair) { return pair.k == KvFormat::kBf16 || pair.v == KvFormat::kBf16; }
double tolerance_of(KvPair pair) { return is_8bit(pair) ? 1e-3 : has_bf16(pair) ? 4e-3 : 5e-4; }  // as in tests/bridge.py

void decode_in_every_format() {
  for (KvPair pair : kv_pairs()) {
    // Of float32 queries tensor cores keep 11 bits.
    for (std::string_view kernel : {"cuda_cores", "tensor_cores"})
      for (auto granularity : {ScaleGranularity::kTokenHead, ScaleGranularity::kHead, ScaleGranularity::kTensor}) {
        Problem problem({.format = pair,
                         .granularity = granularity,
                         .seq_lens = {70, 3, 0, 900},
                         .num_q_tokens = 2,
                         .group = 3,
                         .sliding_window = 333,
                         .logits_soft_cap = 5.f,
                         .has_alibi = true,
                         .has_sinks = true,
                         .has_starts = true,
                         .has_offset = true});
        for (int num_splits : {0, 3}) {
          problem.params.num_splits = num_splits;
          check(problem, kernel, tolerance_of(pair) + (kernel == "tensor_cores" ? 2e-3 : 0.0));
        }
      }
  }
}

const RaggedShape kMixed = {.num_q_tokens = {70, 2, 0, 33, 90, 5, 1}, .num_keys = {70, 90, 5, 130, 31, 0, 700}};

RaggedShape with_everything(RaggedShape shape) {
  shape.group = 3;
  shape.sliding_window = 21;
  shape.logits_soft_cap = 5.f;
  shape.has_alibi = shape.has_sinks = shape.has_starts = true;
  return shape;
}

void hybrid_in_every_format() {
  for (KvPair pair : kv_pairs())
    for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      for (bool causal : {true, false}) {
        RaggedShape shape = kMixed;
        shape.format = pair;
        shape.dtype = dtype;
        shape.causal = causal;
        HybridProblem plain(shape);
        shape.has_offset = true;
        HybridProblem full(with_everything(shape));
        for (HybridProblem* problem : {&plain, &full}) {
          check(*problem, "", tolerance_of(pair));
          if (dtype != DType::kFloat32) check(*problem, "tensor_cores", tolerance_of(pair));
          check(*problem, "cuda_cores", tolerance_of(pair));
        }
      }
}

std::vector<std::string> prefill_variants(DType dtype) {
  std::vector<std::string> names;
  for (const PrefillKernelInfo& row : built_prefill_kernels())
    if (row.backend == "cuda" && row.runs_here && row.dtype == dtype) names.emplace_back(row.variant);
  return names;
}

double prefill_tolerance(DType dtype) { return dtype == DType::kBFloat16 ? 4e-3 : 5e-4; }

void prompts_on_every_kernel() {
  for (DType dtype : {DType::kFloat16, DType::kBFloat16})
    for (int head_dim : {32, 64, 72, 128, 200, 256})
      for (bool causal : {true, false}) {
        RaggedShape shape = kMixed;
        shape.dtype = dtype;
        shape.head_dim = head_dim;
        shape.causal = causal;
        PrefillProblem plain(shape), full(with_everything(shape));
        for (const std::string& variant : prefill_variants(dtype))
          for (PrefillProblem* problem : {&plain, &full}) check(*problem, variant, prefill_tolerance(dtype));
      }
}

void random_shapes() {
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    const RaggedShape shape = random_ragged_shape(seed);
    HybridProblem batch(shape);
    check(batch, "", tolerance_of(shape.format));
    if (!supports_prefill(DeviceKind::kCuda, shape.dtype, shape.head_dim)) continue;
    PrefillProblem prompts(shape);
    check(prompts, "", prefill_tolerance(shape.dtype));
  }
}

void batch_invariant_results_do_not_depend_on_the_batch() {
  HybridProblem problem({.num_q_tokens = {200, 3, 33, 1}, .num_keys = {250, 2500, 300, 1100}, .dtype = DType::kFloat16});
  problem.params.batch_invariant = true;
  check(problem, "", 1e-3);
  const std::vector<uint8_t> out = problem.out_bytes;
  problem.params.batch_size = 2;
  problem.params.num_q_tokens = 203;
  problem.clear_outputs();
  DeviceCopies copies;
  problem.for_each_array([&](const auto& array) { copies.add(array); });
  HybridParams params = problem.params;
  move(params, copies);
  run(params, {.device = {DeviceKind::kCuda, 0}}, copies);
  problem.for_each_output([&](auto& array) { copies.fetch(array); });
  const auto bytes = problem.params.out.token_stride * 203 * bytes_of(DType::kFloat16);
  CHECK(std::equal(out.begin(), out.begin() + bytes, problem.out_bytes.begin()), "rows of a smaller batch");
}

void float32_prompts_are_refused() {
  PrefillProblem problem(kMixed);
  CHECK_THROWS(plan_prefill_attention(problem.params, {.device = {DeviceKind::kCuda, 0}}), Unsupported,
               "prefill_attention: no kernel for head_dim 64 and dtype float32");
}

// Empty: there is a GPU.
std::string reason_to_skip() {
  for (const BackendInfo& backend : built_backends())
    if (backend.device == DeviceKind::kCuda && backend.num_devices == 0) return backend.status;
  return {};
}

}  // namespace

int main() try {
  if (const std::string reason = reason_to_skip(); !reason.empty()) {
    std::printf("cuda_test: skipped: %s\n", reason.c_str());
    return kSkipped;
  }
  decode_in_every_format();
  hybrid_in_every_format();
  prompts_on_every_kernel();
  random_shapes();
  batch_invariant_results_do_not_depend_on_the_batch();
  float32_prompts_are_refused();
  return finish("cuda_test");
} catch (const std::exception& error) {
  std::printf("cuda_test: %s\n", error.what());
  return 1;
}
