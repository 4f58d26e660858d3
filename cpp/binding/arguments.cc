#include "binding/arguments.h"

#include <cmath>
#include <limits>

namespace quantattn::binding {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();

// The value may be anything: its start is enough to find it.
std::string describe_value(py::handle object) {
  constexpr size_t kMaxLength = 60;
  std::string text = py::repr(object);
  if (text.size() > kMaxLength) text = text.substr(0, kMaxLength) + "...";
  return text + " of type " + Py_TYPE(object.ptr())->tp_name;
}

}  // namespace

void require_type(const Tensor& tensor, ElementType expected) {
  if (tensor.type != expected)
    fail_argument(tensor.who, ": ", tensor.name, " must be ", name(expected), ", got ", describe_type(tensor));
}

DType require_value_type(const Tensor& tensor) {
  const std::optional<DType> type = value_type(tensor.type);
  if (!type) fail_argument(tensor.who, ": ", tensor.name, " must be float32, float16 or bfloat16, got ", describe_type(tensor));
  return *type;
}

void require_device(const Tensor& tensor, Device device, std::string_view like) {
  if (tensor.device != device)
    fail_argument(tensor.who, ": ", tensor.name, " must be on ", describe(device), " like ", like, ", got ",
                  describe(tensor.device));
}

void require_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, std::string_view symbols) {
  bool is_right = static_cast<size_t>(tensor.ndim) == shape.size();
  for (size_t i = 0; is_right && i < shape.size(); ++i) {
    const int64_t expected = shape.begin()[i];
    is_right = expected == kAnySize || expected == tensor.shape[i];
  }
  if (is_right) return;
  std::string expected;
  for (int64_t size : shape) append_item(expected, size == kAnySize ? "any" : std::to_string(size));
  fail_argument(tensor.who, ": ", tensor.name, " must have shape ", symbols, " = [", expected, "], got ",
                describe_shape(tensor));
}

void require_contiguous_vectors(const Tensor& tensor) {
  const int last = tensor.ndim - 1;
  if (tensor.num_elements() > 0 && tensor.shape[last] > 1 && tensor.strides[last] != 1)
    fail_argument(tensor.who, ": ", tensor.name, " must be contiguous in its last dimension (stride 1), got stride ",
                  tensor.strides[last]);
}

void require_contiguous(const Tensor& tensor) {
  int64_t expected = 1;
  if (tensor.num_elements() == 0) return;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] > 1 && tensor.strides[i] != expected)
      fail_argument(tensor.who, ": ", tensor.name, " must be contiguous, got stride ", tensor.strides[i], " in dimension ", i);
    expected *= tensor.shape[i];
  }
}

void require_aligned(const Tensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(bytes_of(tensor.type)) != 0)
    fail_argument(tensor.who, ": ", tensor.name, " must be aligned to its element size of ", bytes_of(tensor.type),
                  " bytes, got address ", tensor.data);
}

void require_positive_on_cpu(const Tensor& scale) {
  if (scale.device.kind != DeviceKind::kCpu) return;
  const int64_t stride = scale.ndim == 0 ? 0 : scale.strides[0];
  for (int64_t i = 0; i < scale.num_elements(); ++i) {
    const float value = static_cast<const float*>(scale.data)[i * stride];
    if (!(value > 0.f && std::isfinite(value)))
      fail_argument(scale.who, ": ", scale.name, " must be positive and finite, got ", value);
  }
}

Strided2D<const float> channel_offset(const Tensor& offset, int64_t num_heads, int64_t head_dim, Device device,
                                      std::string_view like) {
  require_type(offset, ElementType::kFloat32);
  require_device(offset, device, like);
  require_shape(offset, {num_heads, head_dim}, "[H, D]");
  require_contiguous_vectors(offset);
  require_aligned(offset);
  const Strided2D<const float> view{static_cast<const float*>(offset.data), offset.strides[0], 1};
  if (offset.device.kind != DeviceKind::kCpu) return view;
  for (int64_t head = 0; head < num_heads; ++head)
    for (int64_t i = 0; i < head_dim; ++i)
      if (!std::isfinite(view.at(head, i)))
        fail_argument(offset.who, ": ", offset.name, " must be finite, got ", view.at(head, i));
  return view;
}

int to_int(const Tensor& tensor, int axis) {
  if (tensor.shape[axis] > kMaxInt)
    fail_argument(tensor.who, ": ", tensor.name, " must have at most ", kMaxInt, " entries in dimension ", axis, ", got ",
                  tensor.shape[axis]);
  return static_cast<int>(tensor.shape[axis]);
}

std::optional<float> read_optional_float(py::handle object, std::string_view who, std::string_view name) {
  if (object.is_none()) return std::nullopt;
  const bool is_number = PyFloat_Check(object.ptr()) || (PyLong_Check(object.ptr()) && !PyBool_Check(object.ptr()));
  if (!is_number) fail_argument(who, ": ", name, " must be a Python float or None, got ", describe_value(object));
  double value = PyFloat_AsDouble(object.ptr());
  if (PyErr_Occurred()) {  // an integer too large for a double
    PyErr_Clear();
    value = std::numeric_limits<double>::infinity();
  }
  const auto narrowed = static_cast<float>(value);
  if (!std::isfinite(narrowed)) fail_argument(who, ": ", name, " must be finite in float32, got ", describe_value(object));
  return narrowed;
}

std::optional<int> read_optional_count(py::handle object, std::string_view who, std::string_view name) {
  if (object.is_none()) return std::nullopt;
  if (!PyLong_Check(object.ptr()) || PyBool_Check(object.ptr()))
    fail_argument(who, ": ", name, " must be an int or None, got ", describe_value(object));
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
  if (overflow != 0 || value < 1 || value > kMaxInt)
    fail_argument(who, ": ", name, " must be at least 1 and at most ", kMaxInt, ", got ", describe_value(object));
  return static_cast<int>(value);
}

bool read_bool(py::handle object, std::string_view who, std::string_view name) {
  if (!PyBool_Check(object.ptr())) fail_argument(who, ": ", name, " must be True or False, got ", describe_value(object));
  return object.ptr() == Py_True;
}

std::string read_string(py::handle object, std::string_view who, std::string_view name) {
  if (!PyUnicode_Check(object.ptr())) fail_argument(who, ": ", name, " must be a string, got ", describe_value(object));
  return object.cast<std::string>();
}

}  // namespace quantattn::binding
