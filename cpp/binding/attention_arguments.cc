#include "binding/attention_arguments.h"

#include <algorithm>
#include <cmath>

namespace quantattn::binding {

AttentionArguments::AttentionArguments(std::string_view who, const CacheHandle* cache) : who_(who), cache_(cache) {
  if (cache != nullptr) cache->require_unmoved(who);
}

const Tensor& AttentionArguments::add_input(const Tensor& tensor) { return inputs_[num_inputs_++] = tensor; }
const Tensor& AttentionArguments::add_output(const Tensor& tensor) { return outputs_[num_outputs_++] = tensor; }

void AttentionArguments::require_common_device(const Tensor& tensor) const {
  if (cache_ != nullptr)
    require_device(tensor, cache_->device(), "the cache");
  else if (num_inputs_ > 0)
    require_device(tensor, query().device, "q");
}

const Tensor& AttentionArguments::read_input(py::handle object, std::string_view name, ElementType type) {
  const Tensor tensor = read_tensor(object, who_, name);
  require_type(tensor, type);
  require_aligned(tensor);
  require_common_device(tensor);
  return add_input(tensor);
}

const Tensor& AttentionArguments::read_queries(py::handle q_object) {
  const Tensor q = read_tensor(q_object, who_, "q");
  require_value_type(q);
  require_common_device(q);
  require_aligned(q);
  return add_input(q);
}

const Tensor& AttentionArguments::read_rows(py::handle object, std::string_view name, int64_t size, int64_t num_heads) {
  const Tensor& rows = read_input(object, name, query().type);
  require_shape(rows, {size, num_heads, query().shape[query().ndim - 1]}, "[S, H, D]");
  require_contiguous_vectors(rows);
  return rows;
}

Strided1D<const int32_t> AttentionArguments::read_ints(py::handle object, std::string_view name, int64_t size,
                                                       std::string_view symbols) {
  const Tensor& ints = read_input(object, name, ElementType::kInt32);
  require_shape(ints, {size}, symbols);
  return {static_cast<const int32_t*>(ints.data), ints.strides[0]};
}

void AttentionArguments::require_query_shape(std::initializer_list<int64_t> shape, std::string_view symbols) const {
  require_shape(query(), shape, symbols);
  require_contiguous_vectors(query());
}

int AttentionArguments::read_batch_size(py::handle object, Strided1D<const int32_t>& cu_seqlens_q) {
  cu_seqlens_q = read_ints(object, "cu_seqlens_q", kAnySize, "[B + 1]");
  const Tensor& ints = inputs_[num_inputs_ - 1];
  if (ints.shape[0] == 0) fail_argument(who_, ": cu_seqlens_q must have at least 1 entry, got shape ", describe_shape(ints));
  return to_int(ints, 0) - 1;
}

const Tensor& AttentionArguments::read_out(py::handle object) {
  const Tensor& q = query();
  const Tensor out = read_tensor(object, who_, "out");
  require_type(out, q.type);
  require_device(out, q.device, "q");
  const bool is_shape_of_q = out.ndim == q.ndim && std::equal(q.shape, q.shape + q.ndim, out.shape);
  if (!is_shape_of_q) fail_argument(who_, ": out must have the shape of q, ", describe_shape(q), ", got ", describe_shape(out));
  require_contiguous_vectors(out);
  require_aligned(out);
  return add_output(out);
}

float* AttentionArguments::read_lse(py::handle object) {
  if (object.is_none()) return nullptr;
  const Tensor& q = query();
  const Tensor lse = read_tensor(object, who_, "lse");
  require_type(lse, ElementType::kFloat32);
  require_device(lse, q.device, "q");
  if (lse.ndim != q.ndim - 1 || !std::equal(lse.shape, lse.shape + lse.ndim, q.shape))
    fail_argument(who_, ": lse must have the shape of q without head_dim, got ", describe_shape(lse));
  require_contiguous(lse);
  return static_cast<float*>(add_output(lse).data);
}

Strided2D<const int32_t> AttentionArguments::read_page_table(py::handle object, int batch_size, int& max_pages) {
  const Tensor& table = read_input(object, "page_table", ElementType::kInt32);
  require_shape(table, {batch_size, kAnySize}, "[B, max_pages]");
  max_pages = to_int(table, 1);
  // An empty table is one that was given, with no page for any sequence.
  static constexpr int32_t kNoPages = 0;
  const void* data = table.data == nullptr ? &kNoPages : table.data;
  return {static_cast<const int32_t*>(data), table.strides[0], table.strides[1]};
}

Strided2D<const float> AttentionArguments::read_alibi_slopes(py::handle object, int batch_size, int num_q_heads) {
  if (object.is_none()) return {};
  const Tensor& slopes = read_input(object, "alibi_slopes", ElementType::kFloat32);
  const bool is_per_sequence = slopes.ndim == 2;
  if (is_per_sequence)
    require_shape(slopes, {batch_size, num_q_heads}, "[B, Hq]");
  else
    require_shape(slopes, {num_q_heads}, "[Hq] or [B, Hq]");
  return {static_cast<const float*>(slopes.data), is_per_sequence ? slopes.strides[0] : 0, slopes.strides[slopes.ndim - 1]};
}

Strided1D<const float> AttentionArguments::read_sinks(py::handle object, int num_q_heads) {
  if (object.is_none()) return {};
  const Tensor& sinks = read_input(object, "sinks", ElementType::kFloat32);
  require_shape(sinks, {num_q_heads}, "[Hq]");
  return {static_cast<const float*>(sinks.data), sinks.strides[0]};
}

float AttentionArguments::read_sm_scale(py::handle object, int head_dim) const {
  const auto default_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  return read_optional_float(object, who_, "sm_scale").value_or(default_scale);
}

float AttentionArguments::read_logits_soft_cap(py::handle object) const {
  const std::optional<float> cap = read_optional_float(object, who_, "logits_soft_cap");
  if (cap && !(*cap > 0.f)) fail_argument(who_, ": logits_soft_cap must be positive, got ", *cap);
  return cap.value_or(0.f);
}

void AttentionArguments::require_outputs_apart() const {
  for (int i = 0; i < num_outputs_; ++i) {
    require_distinct_elements(outputs_[i]);
    for (int j = 0; j < num_inputs_; ++j) require_no_overlap(outputs_[i], inputs_[j]);
    for (int j = i + 1; j < num_outputs_; ++j) require_no_overlap(outputs_[i], outputs_[j]);
    if (cache_ == nullptr) continue;
    for (const Tensor& tensor : cache_->tensors()) require_no_overlap(outputs_[i], tensor, "the cache's ");
  }
}

}  // namespace quantattn::binding
