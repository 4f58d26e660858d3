#pragma once

#include <cstdint>

// The part of the DLPack 1.x binary interface that reading and allocating tensors needs. The layouts are fixed by the
// specification (https://dmlc.github.io/dlpack/latest/c_api.html); a major version other than 1 is not used.
namespace quantattn::binding::dlpack {

inline constexpr uint32_t kMajorVersion = 1;
inline constexpr const char* kExchangeApiAttribute = "__dlpack_c_exchange_api__";
inline constexpr const char* kExchangeApiCapsule = "dlpack_exchange_api";

struct Version {
  uint32_t major, minor;
};

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
struct Device {
  int32_t type, id;
};

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kFloat8E4M3Fn = 10, kFloat8E5M2 = 12 };
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; may be null for a compact row-major tensor
  uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* manager_context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* previous;
};

// Functions that a framework's tensor type offers in place of Python calls. Each returns 0, or -1 with a Python error set
// (the allocator reports through `set_error` instead).
struct ExchangeApi {
  ExchangeApiHeader header;
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*managed_tensor_from_object)(void* object, ManagedTensor** out);
  int (*object_from_managed_tensor)(ManagedTensor* tensor, void** out);
  int (*tensor_from_object)(void* object, Tensor* out);  // borrows: valid while the object lives
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace quantattn::binding::dlpack
