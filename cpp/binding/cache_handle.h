#pragma once

#include <optional>
#include <string>
#include <vector>

#include "binding/memory_overlap.h"
#include "binding/tensor.h"
#include "quantattn/kv_cache.h"

namespace quantattn::binding {

// The tensors of one KVCache, checked once, so that a call over the cache need not check them again. It holds references to
// the tensor objects, whose memory must stay where it is.
//
// Shapes: N = num_pages, P = page_size, H = num_kv_heads, D = head_dim.
//   k, v              [N, P, H, D] with layout "NHD", [N, H, P, D] with "HND"; D contiguous, other strides free
//   k_scale, v_scale  float32 [] or [H]; float16 [N, P, H] ("NHD") or [N, H, P] ("HND"); None for formats without scales
//   k_offset          float32 [H, D], D contiguous; or None
class CacheHandle {
 public:
  CacheHandle(py::object k, py::object v, py::object k_scale, py::object v_scale, py::handle layout, py::object k_offset);

  const KvCacheView& view() const { return view_; }
  Device device() const { return tensors_.front().device; }
  bool is_hnd() const { return is_hnd_; }
  // Codes and scales of K and V, and the offset of K, for overlap checks.
  const std::vector<Tensor>& tensors() const { return tensors_; }
  // Throws InvalidArgument after resize_, set_ or the like on one of the tensors: the pointers here would dangle.
  void require_unmoved(std::string_view who) const;
  // Throws InvalidArgument where appending would write a byte twice.
  void require_writable(std::string_view who) const;

 private:
  VectorArray vectors(const Tensor& codes) const;
  void take_codes(const Tensor& k, const Tensor& v);
  ScaleView take_scale(py::handle scale, KvFormat format, const Tensor& codes, std::string_view name);
  ScaleView scale_view(const Tensor& scale, std::string_view name) const;
  void take_offset(py::handle offset, const Tensor& codes);

  std::vector<py::object> objects_;
  std::vector<Tensor> tensors_;
  KvCacheView view_;
  bool is_hnd_ = false;
};

}  // namespace quantattn::binding
