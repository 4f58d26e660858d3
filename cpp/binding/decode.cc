#include <algorithm>
#include <cmath>

#include "binding/arguments.h"
#include "binding/operations.h"
#include "binding/workspace.h"

namespace quantattn::binding {
namespace {

constexpr std::string_view kWho = "decode_attention";

thread_local DecodePlan last_plan;
std::string forced_variant;

// Reads the arguments of one call into `params`; an object, so that each group of arguments is one short step.
class DecodeArguments {
 public:
  explicit DecodeArguments(const CacheHandle& cache) : cache_(cache) {
    cache.require_unmoved(kWho);
    params.cache = cache.view();
  }

  void read_queries(py::handle q);
  void read_outputs(py::handle out, py::handle lse);
  void read_sequences(py::handle seq_lens, py::handle page_table, py::handle seq_starts);
  void read_head_tensors(py::handle alibi_slopes, py::handle sinks);
  void read_numbers(py::handle sm_scale, py::handle sliding_window, py::handle logits_soft_cap, py::handle num_splits,
                    py::handle batch_invariant);
  void require_outputs_apart() const;
  const Tensor& query() const { return inputs_[0]; }

  DecodeParams params;

 private:
  Tensor read_input(py::handle object, std::string_view name, ElementType type) {
    const Tensor tensor = read_tensor(object, kWho, name);
    require_type(tensor, type);
    require_aligned(tensor);
    require_device(tensor, cache_.device(), "the cache");
    inputs_[num_inputs_++] = tensor;
    return tensor;
  }

  static constexpr int kMaxInputs = 6, kMaxOutputs = 2;
  const CacheHandle& cache_;
  Tensor inputs_[kMaxInputs], outputs_[kMaxOutputs];
  int num_inputs_ = 0, num_outputs_ = 0;
};

VectorArray query_vectors(const Tensor& tensor) {
  const bool has_tokens = tensor.ndim == 4;
  return {tensor.data, tensor.strides[0], has_tokens ? tensor.strides[1] : 0, tensor.strides[tensor.ndim - 2]};
}

void DecodeArguments::read_queries(py::handle q_object) {
  const Tensor q = read_tensor(q_object, kWho, "q");
  params.q_dtype = require_value_type(q);
  require_device(q, cache_.device(), "the cache");
  if (q.ndim == 4)
    require_shape(q, {kAnySize, kAnySize, kAnySize, params.cache.head_dim}, "[B, n, Hq, D]");
  else
    require_shape(q, {kAnySize, kAnySize, params.cache.head_dim}, "[B, Hq, D] or [B, n, Hq, D]");
  require_contiguous_vectors(q);
  require_aligned(q);
  inputs_[num_inputs_++] = q;
  params.q = query_vectors(q);
  params.batch_size = to_int(q, 0);
  params.num_q_tokens = q.ndim == 4 ? to_int(q, 1) : 1;
  params.num_q_heads = to_int(q, q.ndim - 2);
}

void DecodeArguments::read_outputs(py::handle out_object, py::handle lse_object) {
  const Tensor& q = query();
  const Tensor out = read_tensor(out_object, kWho, "out");
  require_type(out, q.type);
  require_device(out, q.device, "q");
  const bool is_shape_of_q = out.ndim == q.ndim && std::equal(q.shape, q.shape + q.ndim, out.shape);
  if (!is_shape_of_q) fail_argument(kWho, ": out must have the shape of q, ", describe_shape(q), ", got ", describe_shape(out));
  require_contiguous_vectors(out);
  require_aligned(out);
  outputs_[num_outputs_++] = out;
  params.out = query_vectors(out);
  if (lse_object.is_none()) return;
  const Tensor lse = read_tensor(lse_object, kWho, "lse");
  require_type(lse, ElementType::kFloat32);
  require_device(lse, q.device, "q");
  if (lse.ndim != q.ndim - 1 || !std::equal(lse.shape, lse.shape + lse.ndim, q.shape))
    fail_argument(kWho, ": lse must have the shape of q without head_dim, got ", describe_shape(lse));
  require_contiguous(lse);
  params.lse = static_cast<float*>(lse.data);
  outputs_[num_outputs_++] = lse;
}

void DecodeArguments::read_sequences(py::handle seq_lens_object, py::handle page_table_object, py::handle seq_starts_object) {
  const int64_t batch_size = params.batch_size;
  const Tensor seq_lens = read_input(seq_lens_object, "seq_lens", ElementType::kInt32);
  require_shape(seq_lens, {batch_size}, "[B]");
  params.seq_lens = {static_cast<const int32_t*>(seq_lens.data), seq_lens.strides[0]};
  if (!page_table_object.is_none()) {
    const Tensor page_table = read_input(page_table_object, "page_table", ElementType::kInt32);
    require_shape(page_table, {batch_size, kAnySize}, "[B, max_pages]");
    params.page_table = {static_cast<const int32_t*>(page_table.data), page_table.strides[0], page_table.strides[1]};
    params.max_pages = to_int(page_table, 1);
    // An empty table is one that was given, with no page for any sequence.
    static constexpr int32_t kNoPages = 0;
    if (page_table.data == nullptr) params.page_table.data = &kNoPages;
  }
  if (!seq_starts_object.is_none()) {
    const Tensor seq_starts = read_input(seq_starts_object, "seq_starts", ElementType::kInt32);
    require_shape(seq_starts, {batch_size}, "[B]");
    params.seq_starts = {static_cast<const int32_t*>(seq_starts.data), seq_starts.strides[0]};
  }
}

void DecodeArguments::read_head_tensors(py::handle alibi_slopes_object, py::handle sinks_object) {
  const int64_t batch_size = params.batch_size, num_q_heads = params.num_q_heads;
  if (!alibi_slopes_object.is_none()) {
    const Tensor slopes = read_input(alibi_slopes_object, "alibi_slopes", ElementType::kFloat32);
    const bool is_per_sequence = slopes.ndim == 2;
    if (is_per_sequence)
      require_shape(slopes, {batch_size, num_q_heads}, "[B, Hq]");
    else
      require_shape(slopes, {num_q_heads}, "[Hq] or [B, Hq]");
    params.alibi_slopes = {static_cast<const float*>(slopes.data), is_per_sequence ? slopes.strides[0] : 0,
                           slopes.strides[slopes.ndim - 1]};
  }
  if (!sinks_object.is_none()) {
    const Tensor sinks = read_input(sinks_object, "sinks", ElementType::kFloat32);
    require_shape(sinks, {num_q_heads}, "[Hq]");
    params.sinks = {static_cast<const float*>(sinks.data), sinks.strides[0]};
  }
}

void DecodeArguments::read_numbers(py::handle sm_scale, py::handle sliding_window, py::handle logits_soft_cap,
                                   py::handle num_splits, py::handle batch_invariant) {
  const float default_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(params.cache.head_dim)));
  params.sm_scale = read_optional_float(sm_scale, kWho, "sm_scale").value_or(default_scale);
  params.sliding_window = read_optional_count(sliding_window, kWho, "sliding_window").value_or(0);
  const std::optional<float> cap = read_optional_float(logits_soft_cap, kWho, "logits_soft_cap");
  if (cap && !(*cap > 0.f)) fail_argument(kWho, ": logits_soft_cap must be positive, got ", *cap);
  params.logits_soft_cap = cap.value_or(0.f);
  params.num_splits = read_optional_count(num_splits, kWho, "num_splits").value_or(0);
  params.batch_invariant = read_bool(batch_invariant, kWho, "batch_invariant");
}

void DecodeArguments::require_outputs_apart() const {
  for (int i = 0; i < num_outputs_; ++i) {
    require_distinct_elements(outputs_[i]);
    for (int j = 0; j < num_inputs_; ++j) require_no_overlap(outputs_[i], inputs_[j]);
    for (int j = i + 1; j < num_outputs_; ++j) require_no_overlap(outputs_[i], outputs_[j]);
    for (const Tensor& tensor : cache_.tensors()) require_no_overlap(outputs_[i], tensor, "the cache's ");
  }
}

// The lengths that a CPU plan was made from are read again by the run, with no Python in between.
void run_on_cpu(const DecodeParams& params, const Execution& execution) {
  const py::gil_scoped_release release;
  last_plan = plan_decode_attention(params, execution);
  quantattn::decode_attention(params, execution, last_plan, {cpu_scratch(last_plan.workspace_bytes), nullptr});
}

void run_on_cuda(const DecodeParams& params, const Execution& execution, const Tensor& q) {
  last_plan = plan_decode_attention(params, execution);
  const CudaScratch scratch(q, last_plan.workspace_bytes);
  void* const counters =
      last_plan.counter_bytes > 0 ? cuda_counters(execution.device, execution.stream, last_plan.counter_bytes) : nullptr;
  const py::gil_scoped_release release;
  quantattn::decode_attention(params, execution, last_plan, {scratch.data(), counters});
}

}  // namespace

Execution execution_on(const Tensor& tensor, int num_threads) {
  Execution execution{.device = tensor.device, .num_threads = num_threads};
  if (tensor.device.kind == DeviceKind::kCuda) execution.stream = current_stream(tensor);
  return execution;
}

void decode_attention(const CacheHandle& cache, py::handle q, py::handle out, py::handle lse, py::handle seq_lens,
                      py::handle page_table, py::handle seq_starts, py::handle sm_scale, py::handle alibi_slopes,
                      py::handle sliding_window, py::handle logits_soft_cap, py::handle sinks, py::handle num_splits,
                      py::handle batch_invariant, int num_threads) {
  DecodeArguments arguments(cache);
  arguments.read_queries(q);
  arguments.read_outputs(out, lse);
  arguments.read_sequences(seq_lens, page_table, seq_starts);
  arguments.read_head_tensors(alibi_slopes, sinks);
  arguments.read_numbers(sm_scale, sliding_window, logits_soft_cap, num_splits, batch_invariant);
  arguments.require_outputs_apart();
  Execution execution = execution_on(arguments.query(), num_threads);
  const std::string forced = forced_variant;  // a copy: another thread may change it while this one runs without the GIL
  execution.kernel = forced;
  if (execution.device.kind == DeviceKind::kCpu)
    run_on_cpu(arguments.params, execution);
  else
    run_on_cuda(arguments.params, execution, arguments.query());
}

py::object last_kernel() {
  if (last_plan.kernel == nullptr) return py::none();
  return py::make_tuple(std::string(last_plan.backend), std::string(last_plan.variant), last_plan.num_splits,
                        last_plan.split_size);
}

void set_forced_kernel(std::string variant) { forced_variant = std::move(variant); }
std::string forced_kernel() { return forced_variant; }

}  // namespace quantattn::binding
