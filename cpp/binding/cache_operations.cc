// Writing and reading codes: append_kv, quantize_kv, dequantize_kv.
#include <algorithm>

#include "binding/arguments.h"
#include "binding/operations.h"
#include "quantattn/quantize.h"

namespace quantattn::binding {
namespace {

Tensor read_rows(py::handle object, std::string_view name, const CacheHandle& cache, const Tensor* k) {
  constexpr std::string_view kWho = "append_kv";
  const Tensor rows = read_tensor(object, kWho, name);
  require_value_type(rows);
  if (k != nullptr) require_type(rows, k->type);
  require_device(rows, cache.device(), "the cache");
  require_shape(rows, {k != nullptr ? k->shape[0] : kAnySize, cache.view().num_kv_heads, cache.view().head_dim}, "[T, H, D]");
  require_contiguous_vectors(rows);
  require_aligned(rows);
  return rows;
}

// Tensors of 2 to 4 dimensions [..., H, D] as pages, tokens and heads.
VectorArray code_vectors(const Tensor& tensor) {
  const int head_axis = tensor.ndim - 2;
  return {tensor.data, head_axis >= 2 ? tensor.strides[head_axis - 2] : 0, head_axis >= 1 ? tensor.strides[head_axis - 1] : 0,
          tensor.strides[head_axis]};
}

ScaleView read_scale(py::handle object, std::string_view who, const Tensor& codes, KvFormat format, bool is_output) {
  const std::optional<Tensor> given = read_optional_tensor(object, who, "scale");
  if (given.has_value() != info(format).has_scale)
    fail_argument(who, ": scale must be ", info(format).has_scale ? "given" : "None", " for ", describe_type(codes), ", got ",
                  given ? "a tensor" : "None");
  if (!given) return {};
  const Tensor& scale = *given;
  require_device(scale, codes.device, "codes");
  require_aligned(scale);
  const int head_axis = codes.ndim - 2;
  ScaleView view{.data = scale.data};
  if (scale.type == ElementType::kFloat32 && scale.ndim == 0) {
    view.granularity = ScaleGranularity::kTensor;
  } else if (scale.type == ElementType::kFloat32 && scale.ndim == 1) {
    require_shape(scale, {codes.shape[head_axis]}, "[H]");
    view.granularity = ScaleGranularity::kHead;
    view.head_stride = scale.strides[0];
  } else if (scale.type == ElementType::kFloat16 && scale.ndim == codes.ndim - 1 &&
             std::equal(scale.shape, scale.shape + scale.ndim, codes.shape)) {
    view.granularity = ScaleGranularity::kTokenHead;
    view.page_stride = head_axis >= 2 ? scale.strides[head_axis - 2] : 0;
    view.token_stride = head_axis >= 1 ? scale.strides[head_axis - 1] : 0;
    view.head_stride = scale.strides[head_axis];
    if (is_output) require_distinct_elements(scale);
  } else {
    fail_argument(who, ": scale must be float32 of shape [] or [H], or float16 of the codes' shape without head_dim, got ",
                  describe_type(scale), " of shape ", describe_shape(scale), " beside codes of shape ", describe_shape(codes));
  }
  if (view.granularity != ScaleGranularity::kTokenHead) require_positive_on_cpu(scale);
  return view;
}

Strided2D<const float> read_offset(py::handle object, std::string_view who, const Tensor& codes, const Tensor& output) {
  const std::optional<Tensor> given = read_optional_tensor(object, who, "offset");
  if (!given) return {};
  require_no_overlap(output, *given);
  return channel_offset(*given, codes.shape[codes.ndim - 2], codes.shape[codes.ndim - 1], codes.device, "codes");
}

CodecParams read_codec(py::handle values_object, py::handle codes_object, py::handle scale, py::handle offset,
                       std::string_view who, bool writes_codes) {
  const Tensor values = read_tensor(values_object, who, "x"), codes = read_tensor(codes_object, who, "codes");
  const std::optional<KvFormat> format = format_of(codes.type);
  if (!format) fail_argument(who, ": codes must have the dtype of a KV format, got ", describe_type(codes));
  if (codes.ndim < 2) fail_argument(who, ": codes must have shape [..., H, D], got ", describe_shape(codes));
  require_device(values, codes.device, "codes");
  if (values.ndim != codes.ndim || !std::equal(codes.shape, codes.shape + codes.ndim, values.shape))
    fail_argument(who, ": x must have the shape of codes, ", describe_shape(codes), ", got ", describe_shape(values));
  for (const Tensor* tensor : {&values, &codes}) {
    require_contiguous_vectors(*tensor);
    require_aligned(*tensor);
  }
  const Tensor& output = writes_codes ? codes : values;
  require_distinct_elements(output);
  require_no_overlap(output, writes_codes ? values : codes);
  const int head_axis = codes.ndim - 2;
  return {.format = *format,
          .values = code_vectors(values),
          .codes = code_vectors(codes),
          .scale = read_scale(scale, who, codes, *format, writes_codes),
          .offset = read_offset(offset, who, codes, output),
          .value_dtype = require_value_type(values),
          .num_pages = head_axis >= 2 ? codes.shape[head_axis - 2] : 1,
          .page_size = head_axis >= 1 ? codes.shape[head_axis - 1] : 1,
          .num_heads = to_int(codes, head_axis),
          .head_dim = to_int(codes, head_axis + 1)};
}

}  // namespace

void append_kv(const CacheHandle& cache, py::handle k_object, py::handle v_object, py::handle slots_object) {
  const Tensor k = read_rows(k_object, "k", cache, nullptr), v = read_rows(v_object, "v", cache, &k);
  const Tensor slots = read_tensor(slots_object, "append_kv", "slot_mapping");
  require_type(slots, ElementType::kInt64);
  require_device(slots, cache.device(), "the cache");
  require_shape(slots, {k.shape[0]}, "[T]");
  require_aligned(slots);
  cache.require_unmoved("append_kv");
  cache.require_writable("append_kv");
  for (const Tensor& written : cache.tensors())
    for (const Tensor* input : {&k, &v, &slots}) require_no_overlap(*input, written, "the cache's ");
  const AppendParams params{.k = token_vectors(k),
                            .v = token_vectors(v),
                            .dtype = require_value_type(k),
                            .num_tokens = k.shape[0],
                            .slot_mapping = {static_cast<const int64_t*>(slots.data), slots.strides[0]},
                            .cache = cache.view()};
  const Execution execution = execution_on(k);
  const py::gil_scoped_release release;
  quantattn::append_kv(params, execution);
}

void quantize_kv(py::handle values, py::handle codes, py::handle scale, py::handle offset) {
  const CodecParams params = read_codec(values, codes, scale, offset, "quantize_kv", true);
  const Execution execution = execution_on(read_tensor(codes, "quantize_kv", "codes"));
  const py::gil_scoped_release release;
  quantattn::quantize_kv(params, execution);
}

void dequantize_kv(py::handle codes, py::handle scale, py::handle offset, py::handle values) {
  const CodecParams params = read_codec(values, codes, scale, offset, "dequantize_kv", false);
  const Execution execution = execution_on(read_tensor(codes, "dequantize_kv", "codes"));
  const py::gil_scoped_release release;
  quantattn::dequantize_kv(params, execution);
}

}  // namespace quantattn::binding
