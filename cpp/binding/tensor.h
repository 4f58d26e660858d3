#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "binding/dlpack_abi.h"
#include "quantattn/kv_format.h"
#include "quantattn/types.h"

namespace quantattn::binding {

namespace py = pybind11;

enum class ElementType : uint8_t { kFloat32, kFloat16, kBFloat16, kInt8, kFp8E4M3, kFp8E5M2, kInt32, kInt64, kOther };

std::string_view name(ElementType type);  // torch's name
int64_t bytes_of(ElementType type);

// The torch dtype that stores the codes of a KV format.
ElementType code_type(KvFormat format);
std::optional<KvFormat> format_of(ElementType type);
// The element type of queries, outputs and values; nothing for any other.
std::optional<DType> value_type(ElementType type);

inline constexpr int kMaxDims = 4;

// What the checks and kernels need to know of a torch tensor. It borrows the object, which the caller's arguments hold.
struct Tensor {
  PyObject* object = nullptr;
  std::string_view who, name;  // the operation and the argument, for messages
  void* data = nullptr;
  int ndim = 0;
  int64_t shape[kMaxDims] = {}, strides[kMaxDims] = {};  // strides in elements
  ElementType type = ElementType::kOther;
  Device device;

  int64_t num_elements() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }
};

// Throws InvalidArgument unless `object` is a dense torch.Tensor of at most kMaxDims dimensions in CPU or CUDA memory.
Tensor read_tensor(py::handle object, std::string_view who, std::string_view name);
std::optional<Tensor> read_optional_tensor(py::handle object, std::string_view who, std::string_view name);

// Where the tensor's data is now; it may differ from `tensor.data` after resize_, set_ and the like.
const void* data_of(const Tensor& tensor);

// [T, H, D] as vectors [1, T, H].
VectorArray token_vectors(const Tensor& tensor);

// CPU threads of a call: the number set here, else torch's. 0 follows torch again.
int get_num_threads();
void set_num_threads(int num_threads);

// Where a call over `tensor` runs: its device, with torch's current stream of it, or with the threads of a CPU.
Execution execution_on(const Tensor& tensor);

// torch's current stream of a CUDA device, a cudaStream_t.
void* current_stream(const Tensor& tensor);

// The exchange API of the tensor's type; null where this torch has none, or where it is switched off.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type);
// Off: tensors are read through their Python attributes, as with a torch without the exchange API.
void set_exchange_api_enabled(bool enabled);

std::string describe(Device device);
std::string describe_type(const Tensor& tensor);             // the torch dtype, without the module's name
std::string describe_shape(const Tensor& tensor);            // "[2, 8, 128]"
void append_item(std::string& list, std::string_view item);  // with ", " between items

}  // namespace quantattn::binding
