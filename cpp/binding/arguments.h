#pragma once

#include <initializer_list>
#include <optional>
#include <sstream>

#include "binding/tensor.h"
#include "quantattn/error.h"

// Rules that the arguments of a call must keep. Every failure is InvalidArgument: "who: rule, got value".
namespace quantattn::binding {

template <class... Parts>
[[noreturn]] void fail_argument(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw InvalidArgument(message.str());
}

inline constexpr int64_t kAnySize = -1;

void require_type(const Tensor& tensor, ElementType expected);
// float32, float16 or bfloat16.
DType require_value_type(const Tensor& tensor);
void require_device(const Tensor& tensor, Device device, std::string_view like);
// `symbols` names the axes: "[B, Hq]". kAnySize leaves an axis free.
void require_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, std::string_view symbols);
// The elements of a vector (the last axis) lie beside each other.
void require_contiguous_vectors(const Tensor& tensor);
void require_contiguous(const Tensor& tensor);
void require_aligned(const Tensor& tensor);

// A static scale, float32 [] or [H]. Values in CUDA memory are not read: that would wait for the device.
void require_positive_on_cpu(const Tensor& scale);

// A key offset, float32 [H, D] on `device` with D contiguous. Values must be finite; those in CUDA memory are not read.
Strided2D<const float> channel_offset(const Tensor& offset, int64_t num_heads, int64_t head_dim, Device device,
                                      std::string_view like);

// Sizes that the public structs hold as int.
int to_int(const Tensor& tensor, int axis);

// None, or a Python number; tensors are refused, since reading one would wait for its device.
std::optional<float> read_optional_float(py::handle object, std::string_view who, std::string_view name);
// None, or an integer that is at least 1.
std::optional<int> read_optional_count(py::handle object, std::string_view who, std::string_view name);
bool read_bool(py::handle object, std::string_view who, std::string_view name);
std::string read_string(py::handle object, std::string_view who, std::string_view name);

}  // namespace quantattn::binding
