#include "binding/cache_handle.h"

#include "binding/arguments.h"

namespace quantattn::binding {
namespace {

constexpr std::string_view kWho = "KVCache";
// Of a cache tensor, in both layouts.
constexpr int kPageAxis = 0, kDimAxis = 3;

KvFormat require_code_type(const Tensor& codes) {
  const std::optional<KvFormat> format = format_of(codes.type);
  if (format) return *format;
  std::string types;
  for (const KvFormatInfo& row : kKvFormats) append_item(types, name(code_type(row.format)));
  const std::string type = describe_type(codes);
  fail_argument(kWho, ": ", codes.name, " must have the dtype of its codes, one of ", types, ", got ", type,
                type == "uint8" ? "; say what the bytes are, for example with .view(torch.float8_e4m3fn)" : "");
}

std::string pair_names() {
  std::string names;
  for (KvPair pair : kv_pairs()) append_item(names, name(pair));
  return names;
}

bool read_is_hnd(py::handle layout) {
  const std::string text = read_string(layout, kWho, "layout");
  if (text != "NHD" && text != "HND") fail_argument(kWho, ": layout must be \"NHD\" or \"HND\", got \"", text, "\"");
  return text == "HND";
}

}  // namespace

CacheHandle::CacheHandle(py::object k, py::object v, py::object k_scale, py::object v_scale, py::handle layout,
                         py::object k_offset)
    : is_hnd_(read_is_hnd(layout)) {
  const Tensor k_codes = read_tensor(k, kWho, "k"), v_codes = read_tensor(v, kWho, "v");
  tensors_ = {k_codes, v_codes};
  take_codes(k_codes, v_codes);
  view_.k_scale = take_scale(k_scale, view_.format.k, k_codes, "k_scale");
  view_.v_scale = take_scale(v_scale, view_.format.v, v_codes, "v_scale");
  take_offset(k_offset, k_codes);
  objects_ = {std::move(k), std::move(v), std::move(k_scale), std::move(v_scale), std::move(k_offset)};
  validate(view_, kWho);
}

void CacheHandle::take_codes(const Tensor& k, const Tensor& v) {
  view_.format = {require_code_type(k), require_code_type(v)};
  if (!is_kv_pair(view_.format))
    fail_argument(kWho, ": k and v must have the dtypes of a pair of KV formats (", pair_names(), "), got ",
                  name(view_.format));
  require_device(v, k.device, "k");
  require_shape(k, {kAnySize, kAnySize, kAnySize, kAnySize}, is_hnd_ ? "[N, H, P, D]" : "[N, P, H, D]");
  require_shape(v, {k.shape[0], k.shape[1], k.shape[2], k.shape[3]}, "that of k");
  for (const Tensor* codes : {&k, &v}) {
    require_contiguous_vectors(*codes);
    require_aligned(*codes);
  }
  view_.num_pages = k.shape[kPageAxis];
  view_.page_size = to_int(k, is_hnd_ ? 2 : 1);
  view_.num_kv_heads = to_int(k, is_hnd_ ? 1 : 2);
  view_.head_dim = to_int(k, kDimAxis);
  view_.k_codes = vectors(k);
  view_.v_codes = vectors(v);
}

VectorArray CacheHandle::vectors(const Tensor& codes) const {
  return {codes.data, codes.strides[kPageAxis], codes.strides[is_hnd_ ? 2 : 1], codes.strides[is_hnd_ ? 1 : 2]};
}

ScaleView CacheHandle::take_scale(py::handle scale, KvFormat format, const Tensor& codes, std::string_view name) {
  if (scale.is_none()) {
    if (info(format).has_scale)
      fail_argument(kWho, ": ", name, " must be given for ", codes.name, " of ", describe_type(codes),
                    " codes, got None; pass 1.0 where the codes are the numbers themselves");
    return {};
  }
  const Tensor tensor = read_tensor(scale, kWho, name);
  if (!info(format).has_scale)
    fail_argument(kWho, ": ", name, " must be None for ", codes.name, " of ", describe_type(codes), ", got a tensor of shape ",
                  describe_shape(tensor));
  require_device(tensor, codes.device, "k");
  const ScaleView view = scale_view(tensor, name);
  require_aligned(tensor);
  if (view.granularity != ScaleGranularity::kTokenHead) require_positive_on_cpu(tensor);
  tensors_.push_back(tensor);
  return view;
}

ScaleView CacheHandle::scale_view(const Tensor& scale, std::string_view name) const {
  ScaleView view{.data = scale.data};
  if (scale.type == ElementType::kFloat32 && scale.ndim == 0) {
    view.granularity = ScaleGranularity::kTensor;
  } else if (scale.type == ElementType::kFloat32 && scale.ndim == 1) {
    require_shape(scale, {view_.num_kv_heads}, "[H]");
    view.granularity = ScaleGranularity::kHead;
    view.head_stride = scale.strides[0];
  } else if (scale.type == ElementType::kFloat16 && scale.ndim == 3) {
    const int token_axis = is_hnd_ ? 2 : 1, head_axis = is_hnd_ ? 1 : 2;
    require_shape(
        scale,
        {view_.num_pages, is_hnd_ ? view_.num_kv_heads : view_.page_size, is_hnd_ ? view_.page_size : view_.num_kv_heads},
        is_hnd_ ? "[N, H, P]" : "[N, P, H]");
    view.granularity = ScaleGranularity::kTokenHead;
    view.page_stride = scale.strides[kPageAxis];
    view.token_stride = scale.strides[token_axis];
    view.head_stride = scale.strides[head_axis];
  } else {
    fail_argument(kWho, ": ", name, " must be float32 of shape [] or [num_kv_heads], or float16 of shape ",
                  is_hnd_ ? "[num_pages, num_kv_heads, page_size]" : "[num_pages, page_size, num_kv_heads]", ", got ",
                  describe_type(scale), " of shape ", describe_shape(scale));
  }
  // A cache of no pages has no dynamic scale to point at; any aligned address stands for it.
  if (view.data == nullptr) view.data = const_cast<KvCacheView*>(&view_);
  return view;
}

void CacheHandle::take_offset(py::handle offset, const Tensor& codes) {
  if (offset.is_none()) return;
  const Tensor tensor = read_tensor(offset, kWho, "k_offset");
  view_.k_offset = channel_offset(tensor, view_.num_kv_heads, view_.head_dim, codes.device, "k");
  tensors_.push_back(tensor);
}

void CacheHandle::require_unmoved(std::string_view who) const {
  for (const Tensor& tensor : tensors_) {
    const void* data = data_of(tensor);
    if (data != tensor.data)
      fail_argument(who, ": the cache's ", tensor.name, " must stay where it was when the cache was made, got address ", data,
                    " in place of ", tensor.data, "; make a new KVCache of tensors that were resized or replaced");
  }
}

void CacheHandle::require_writable(std::string_view who) const {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    // Static scales and offsets are read only, so that caches may share them.
    if (tensors_[i].type == ElementType::kFloat32) continue;
    Tensor written = tensors_[i];
    written.who = who;
    require_distinct_elements(written);
    for (size_t j = i + 1; j < tensors_.size(); ++j)
      if (overlap(written, tensors_[j]) == Overlap::kYes) require_no_overlap(written, tensors_[j]);
  }
}

}  // namespace quantattn::binding
