#include "binding/tensor.h"

#include <vector>

#include "binding/arguments.h"

namespace quantattn::binding {
namespace {

struct ElementTypeInfo {
  std::string_view name;
  int64_t bytes;
  uint8_t dlpack_code, dlpack_bits;
};

constexpr ElementTypeInfo kElementTypes[] = {
    {"float32", 4, dlpack::kFloat, 32},
    {"float16", 2, dlpack::kFloat, 16},
    {"bfloat16", 2, dlpack::kBFloat, 16},
    {"int8", 1, dlpack::kInt, 8},
    {"float8_e4m3fn", 1, dlpack::kFloat8E4M3Fn, 8},
    {"float8_e5m2", 1, dlpack::kFloat8E5M2, 8},
    {"int32", 4, dlpack::kInt, 32},
    {"int64", 8, dlpack::kInt, 64},
};
constexpr int kNumElementTypes = static_cast<int>(std::size(kElementTypes));
static_assert(kNumElementTypes == static_cast<int>(ElementType::kOther));

struct FormatCode {
  KvFormat format;
  ElementType type;
};
constexpr FormatCode kFormatCodes[] = {
    {KvFormat::kFp16, ElementType::kFloat16},    {KvFormat::kBf16, ElementType::kBFloat16},
    {KvFormat::kInt8, ElementType::kInt8},       {KvFormat::kFp8E4M3, ElementType::kFp8E4M3},
    {KvFormat::kFp8E5M2, ElementType::kFp8E5M2},
};
static_assert(std::size(kFormatCodes) == std::size(kKvFormats), "every KV format needs the torch dtype of its codes");

bool is_exchange_api_enabled = true;
int num_threads_set = 0;  // 0: torch's number

// Importing this module never imports torch; reading a tensor means that torch is there.
py::handle torch_module() {
  static PyObject* const torch = py::module_::import("torch").release().ptr();
  return torch;
}

bool is_torch_tensor(PyTypeObject* type) {
  static PyObject* const tensor_type = py::object(torch_module().attr("Tensor")).release().ptr();
  return PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(tensor_type)) != 0;
}

const dlpack::ExchangeApi* look_up_exchange_api(PyTypeObject* type) {
  const py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), dlpack::kExchangeApiAttribute, py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kExchangeApiCapsule)) return nullptr;
  auto* header = static_cast<dlpack::ExchangeApiHeader*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeApiCapsule));
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) header = header->previous;
  const auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  return api != nullptr && api->tensor_from_object != nullptr ? api : nullptr;
}

struct TensorTypeEntry {
  PyTypeObject* type;
  bool is_tensor;
  const dlpack::ExchangeApi* api;
};

// One entry for each Python type met: torch.Tensor, Parameter, and the classes of wrong arguments.
const TensorTypeEntry& entry_of(PyTypeObject* type) {
  static std::vector<TensorTypeEntry> entries;
  for (const TensorTypeEntry& entry : entries)
    if (entry.type == type) return entry;
  const bool is_tensor = is_torch_tensor(type);
  if (!is_tensor) {
    static const TensorTypeEntry kNotATensor = {nullptr, false, nullptr};
    return kNotATensor;
  }
  Py_INCREF(type);  // the entry outlives a type that was made at run time, so that its address is never another type's
  entries.push_back({type, is_tensor, look_up_exchange_api(type)});
  return entries.back();
}

// torch's reasons run over many lines, with a stack of frames after the first.
[[noreturn]] void fail_not_dense(const Tensor& tensor, const std::string& reason) {
  fail_argument(tensor.who, ": ", tensor.name, " must be a dense tensor in CPU or CUDA memory, got ",
                Py_TYPE(tensor.object)->tp_name, " (", reason.substr(0, reason.find('\n')), ")");
}

void require_num_dims(const Tensor& tensor, int64_t ndim) {
  if (ndim > kMaxDims) fail_argument(tensor.who, ": ", tensor.name, " must have at most ", kMaxDims, " dimensions, got ", ndim);
}

// torch may hold a real tensor as the negative of its memory: the imaginary part of a conjugate, for example.
bool is_negated(const Tensor& tensor) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.object, is_neg));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

void read_through_exchange_api(const dlpack::ExchangeApi& api, Tensor& tensor) {
  dlpack::Tensor source;
  if (api.tensor_from_object(tensor.object, &source) != 0) {
    const py::error_already_set error;
    fail_not_dense(tensor, error.what());
  }
  require_num_dims(tensor, source.ndim);
  tensor.data = source.data == nullptr ? nullptr : static_cast<char*>(source.data) + source.byte_offset;
  tensor.ndim = source.ndim;
  int64_t compact_stride = 1;
  for (int i = source.ndim - 1; i >= 0; --i) {
    tensor.shape[i] = source.shape[i];
    tensor.strides[i] = source.strides != nullptr ? source.strides[i] : compact_stride;
    compact_stride *= source.shape[i];
  }
  for (int i = 0; i < kNumElementTypes; ++i)
    if (kElementTypes[i].dlpack_code == source.dtype.code && kElementTypes[i].dlpack_bits == source.dtype.bits &&
        source.dtype.lanes == 1)
      tensor.type = static_cast<ElementType>(i);
  if (source.device.type == dlpack::kCuda)
    tensor.device = {DeviceKind::kCuda, source.device.id};
  else if (source.device.type != dlpack::kCpu && source.device.type != dlpack::kCudaHost)
    fail_not_dense(tensor, "device " + std::string(py::str(py::handle(tensor.object).attr("device"))));
}

void read_device(py::handle object, Tensor& tensor) {
  const py::object device = object.attr("device");
  const auto kind = device.attr("type").cast<std::string>();
  if (kind == "cuda")
    tensor.device = {DeviceKind::kCuda, device.attr("index").cast<int>()};
  else if (kind != "cpu")
    fail_not_dense(tensor, "device " + kind);
}

void read_through_attributes(Tensor& tensor) {
  const py::handle object(tensor.object);
  try {
    read_device(object, tensor);
    const auto shape = object.attr("shape").cast<py::tuple>();
    const auto strides = object.attr("stride")().cast<py::tuple>();
    require_num_dims(tensor, static_cast<int64_t>(shape.size()));
    tensor.ndim = static_cast<int>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) {
      tensor.shape[i] = shape[i].cast<int64_t>();
      tensor.strides[i] = strides[i].cast<int64_t>();
    }
    tensor.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
  } catch (const py::error_already_set& error) {
    fail_not_dense(tensor, error.what());
  } catch (const py::cast_error& error) {  // a symbolic size of a traced tensor
    fail_not_dense(tensor, error.what());
  }
  const std::string type = describe_type(tensor);
  for (int i = 0; i < kNumElementTypes; ++i)
    if (kElementTypes[i].name == type) tensor.type = static_cast<ElementType>(i);
}

}  // namespace

std::string_view name(ElementType type) {
  return type == ElementType::kOther ? "another dtype" : kElementTypes[static_cast<int>(type)].name;
}

int64_t bytes_of(ElementType type) { return type == ElementType::kOther ? 1 : kElementTypes[static_cast<int>(type)].bytes; }

ElementType code_type(KvFormat format) {
  for (const FormatCode& row : kFormatCodes)
    if (row.format == format) return row.type;
  return ElementType::kOther;
}

std::optional<KvFormat> format_of(ElementType type) {
  for (const FormatCode& row : kFormatCodes)
    if (row.type == type) return row.format;
  return std::nullopt;
}

std::optional<DType> value_type(ElementType type) {
  if (type == ElementType::kFloat32) return DType::kFloat32;
  if (type == ElementType::kFloat16) return DType::kFloat16;
  if (type == ElementType::kBFloat16) return DType::kBFloat16;
  return std::nullopt;
}

Tensor read_tensor(py::handle object, std::string_view who, std::string_view name) {
  const TensorTypeEntry& entry = entry_of(Py_TYPE(object.ptr()));
  if (!entry.is_tensor) fail_argument(who, ": ", name, " must be a torch.Tensor, got ", Py_TYPE(object.ptr())->tp_name);
  Tensor tensor;
  tensor.object = object.ptr();
  tensor.who = who;
  tensor.name = name;
  if (entry.api != nullptr && is_exchange_api_enabled)
    read_through_exchange_api(*entry.api, tensor);
  else
    read_through_attributes(tensor);
  // Fake, meta and functional tensors have shapes but no memory.
  if (tensor.data == nullptr && tensor.num_elements() > 0) fail_not_dense(tensor, "it has no memory");
  if (value_type(tensor.type) && is_negated(tensor))
    fail_argument(who, ": ", name, " must hold its numbers themselves, got the negative view of others; pass ", name,
                  ".resolve_neg()");
  return tensor;
}

std::optional<Tensor> read_optional_tensor(py::handle object, std::string_view who, std::string_view name) {
  if (object.is_none()) return std::nullopt;
  return read_tensor(object, who, name);
}

const void* data_of(const Tensor& tensor) {
  if (const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(tensor.object))) {
    dlpack::Tensor source;
    if (api->tensor_from_object(tensor.object, &source) != 0) throw py::error_already_set();
    return source.data == nullptr ? nullptr : static_cast<char*>(source.data) + source.byte_offset;
  }
  return reinterpret_cast<const void*>(py::handle(tensor.object).attr("data_ptr")().cast<uintptr_t>());
}

void* current_stream(const Tensor& tensor) {
  if (const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(tensor.object))) {
    void* stream = nullptr;
    if (api->current_work_stream(dlpack::kCuda, tensor.device.index, &stream) != 0) throw py::error_already_set();
    return stream;
  }
  const py::object raw_stream = torch_module().attr("_C").attr("_cuda_getCurrentRawStream")(tensor.device.index);
  return reinterpret_cast<void*>(raw_stream.cast<uintptr_t>());
}

VectorArray token_vectors(const Tensor& tensor) { return {tensor.data, 0, tensor.strides[0], tensor.strides[1]}; }

int get_num_threads() {
  if (num_threads_set > 0) return num_threads_set;
  static PyObject* const torch_threads = py::object(torch_module().attr("get_num_threads")).release().ptr();
  return py::handle(torch_threads)().cast<int>();
}

void set_num_threads(int num_threads) { num_threads_set = num_threads; }

Execution execution_on(const Tensor& tensor) {
  Execution execution{.device = tensor.device};
  if (tensor.device.kind == DeviceKind::kCuda)
    execution.stream = current_stream(tensor);
  else
    execution.num_threads = get_num_threads();
  return execution;
}

const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) { return is_exchange_api_enabled ? entry_of(type).api : nullptr; }

void set_exchange_api_enabled(bool enabled) { is_exchange_api_enabled = enabled; }

std::string describe(Device device) { return device.kind == DeviceKind::kCpu ? "cpu" : "cuda:" + std::to_string(device.index); }

std::string describe_type(const Tensor& tensor) {
  const std::string text = py::str(py::handle(tensor.object).attr("dtype"));
  constexpr std::string_view kPrefix = "torch.";
  return text.starts_with(kPrefix) ? text.substr(kPrefix.size()) : text;
}

std::string describe_shape(const Tensor& tensor) {
  std::string sizes;
  for (int i = 0; i < tensor.ndim; ++i) append_item(sizes, std::to_string(tensor.shape[i]));
  return "[" + sizes + "]";
}

void append_item(std::string& list, std::string_view item) {
  if (!list.empty()) list += ", ";
  list += item;
}

}  // namespace quantattn::binding
