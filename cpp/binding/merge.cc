#include "quantattn/merge.h"

#include <algorithm>

#include "binding/arguments.h"
#include "binding/operations.h"

namespace quantattn::binding {
namespace {

constexpr std::string_view kWho = "merge_states";

Tensor read_out(py::handle object, std::string_view name, const Tensor* like) {
  const Tensor out = read_tensor(object, kWho, name);
  if (like == nullptr) {
    require_value_type(out);
    if (out.ndim != 3 && out.ndim != 4)
      fail_argument(kWho, ": ", name, " must have shape [B, H, D] or [B, n, H, D], got ", describe_shape(out));
  } else {
    require_type(out, like->type);
    require_device(out, like->device, "out_a");
    if (out.ndim != like->ndim || !std::equal(out.shape, out.shape + out.ndim, like->shape))
      fail_argument(kWho, ": ", name, " must have the shape of out_a, ", describe_shape(*like), ", got ", describe_shape(out));
  }
  require_contiguous_vectors(out);
  require_aligned(out);
  return out;
}

float* read_lse(py::handle object, std::string_view name, const Tensor& out) {
  const Tensor lse = read_tensor(object, kWho, name);
  require_type(lse, ElementType::kFloat32);
  require_device(lse, out.device, "out_a");
  if (lse.ndim != out.ndim - 1 || !std::equal(lse.shape, lse.shape + lse.ndim, out.shape))
    fail_argument(kWho, ": ", name, " must have the shape of out_a without head_dim, got ", describe_shape(lse), " beside ",
                  describe_shape(out));
  require_contiguous(lse);
  return static_cast<float*>(lse.data);
}

VectorArray vectors(const Tensor& tensor) {
  return {tensor.data, tensor.strides[0], tensor.ndim == 4 ? tensor.strides[1] : 0, tensor.strides[tensor.ndim - 2]};
}

}  // namespace

void merge_states(py::handle out_a, py::handle lse_a, py::handle out_b, py::handle lse_b, py::handle out, py::handle lse) {
  const Tensor a = read_out(out_a, "out_a", nullptr), b = read_out(out_b, "out_b", &a), merged = read_out(out, "out", &a);
  require_distinct_elements(merged);
  require_no_overlap(merged, a);
  require_no_overlap(merged, b);
  MergeParams params{.out_a = vectors(a),
                     .out_b = vectors(b),
                     .out = vectors(merged),
                     .lse_a = read_lse(lse_a, "lse_a", a),
                     .lse_b = read_lse(lse_b, "lse_b", a),
                     .lse = read_lse(lse, "lse", a),
                     .dtype = require_value_type(a),
                     .batch_size = a.shape[0],
                     .num_q_tokens = a.ndim == 4 ? a.shape[1] : 1,
                     .num_q_heads = to_int(a, a.ndim - 2),
                     .head_dim = to_int(a, a.ndim - 1)};
  const Execution execution = execution_on(a);
  const py::gil_scoped_release release;
  quantattn::merge_states(params, execution);
}

}  // namespace quantattn::binding
