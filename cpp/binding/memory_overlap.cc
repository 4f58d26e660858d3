#include "binding/memory_overlap.h"

#include <algorithm>
#include <cstdlib>

#include "binding/arguments.h"

namespace quantattn::binding {
namespace {

struct Axis {
  int64_t size, stride;
};

// Axes of more than one entry, the widest stride first.
struct Axes {
  Axis items[kMaxDims];
  int count = 0;

  explicit Axes(const Tensor& tensor) {
    for (int i = 0; i < tensor.ndim; ++i)
      if (tensor.shape[i] > 1) items[count++] = {tensor.shape[i], tensor.strides[i]};
    std::sort(items, items + count, [](const Axis& a, const Axis& b) { return a.stride > b.stride; });
  }

  // Every stride steps over all that the narrower axes span.
  bool is_nested() const {
    int64_t span = 1;
    for (int i = count - 1; i >= 0; --i) {
      if (items[i].stride < span) return false;
      span += (items[i].size - 1) * items[i].stride;
    }
    return true;
  }
};

struct AddressRange {
  intptr_t begin, end;

  explicit AddressRange(const Tensor& tensor) : begin(reinterpret_cast<intptr_t>(tensor.data)), end(begin) {
    if (tensor.num_elements() == 0) return;
    int64_t last = 0;
    for (int i = 0; i < tensor.ndim; ++i) last += (tensor.shape[i] - 1) * tensor.strides[i];
    end = begin + (last + 1) * bytes_of(tensor.type);
  }
};

bool has_same_layout(const Tensor& a, const Tensor& b) {
  return a.ndim == b.ndim && bytes_of(a.type) == bytes_of(b.type) && std::equal(a.shape, a.shape + a.ndim, b.shape) &&
         std::equal(a.strides, a.strides + a.ndim, b.strides);
}

// Is `distance` bytes the difference of two elements' addresses? With nested axes the rest after an axis is smaller than its
// stride, so only two multiples of each stride can lead there.
bool is_reachable(const Axes& axes, int axis, int64_t distance, int64_t element_bytes) {
  if (axis == axes.count) return std::abs(distance) < element_bytes;
  const int64_t stride = axes.items[axis].stride * element_bytes;
  const int64_t floor = distance / stride - (distance % stride < 0 ? 1 : 0);
  for (int64_t steps = floor; steps <= floor + 1; ++steps)
    if (std::abs(steps) < axes.items[axis].size && is_reachable(axes, axis + 1, distance - steps * stride, element_bytes))
      return true;
  return false;
}

}  // namespace

Overlap overlap(const Tensor& a, const Tensor& b) {
  const AddressRange range_a(a), range_b(b);
  const bool is_empty = range_a.begin == range_a.end || range_b.begin == range_b.end;
  if (is_empty || range_a.end <= range_b.begin || range_b.end <= range_a.begin) return Overlap::kNo;
  if (!has_same_layout(a, b)) return Overlap::kUnknown;
  const Axes axes(a);
  if (!axes.is_nested()) return Overlap::kUnknown;
  return is_reachable(axes, 0, range_b.begin - range_a.begin, bytes_of(a.type)) ? Overlap::kYes : Overlap::kNo;
}

bool overlaps_itself(const Tensor& tensor) { return tensor.num_elements() > 0 && !Axes(tensor).is_nested(); }

void require_distinct_elements(const Tensor& tensor) {
  if (!overlaps_itself(tensor)) return;
  std::string strides;
  for (int i = 0; i < tensor.ndim; ++i) append_item(strides, std::to_string(tensor.strides[i]));
  fail_argument(tensor.who, ": ", tensor.name, " must not overlap itself, as an expanded tensor does, got shape ",
                describe_shape(tensor), " with strides [", strides, "]");
}

void require_no_overlap(const Tensor& tensor, const Tensor& other, std::string_view whose) {
  if (overlap(tensor, other) != Overlap::kNo)
    fail_argument(tensor.who, ": ", tensor.name, " must not share memory with ", whose, other.name, ", got addresses ",
                  tensor.data, " and ", other.data);
}

}  // namespace quantattn::binding
