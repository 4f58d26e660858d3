#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#if defined(__CUDACC__)
#define QATTN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QATTN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace quantattn {

// Element type of queries, outputs and of K/V before quantisation.
enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16 };

constexpr int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
constexpr std::string_view name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kFloat16 ? "float16" : "bfloat16";
}

enum class DeviceKind : uint8_t { kCpu, kCuda };
struct Device {
  DeviceKind kind = DeviceKind::kCpu;
  int index = 0;
  friend constexpr bool operator==(Device, Device) = default;
};

// Strides are in elements and may be zero or, where noted, anything else. A null `data` means "not given".
template <class T>
struct Strided1D {
  T* data = nullptr;
  int64_t stride = 1;
  QATTN_HOST_DEVICE T& operator[](int64_t i) const { return data[i * stride]; }
  QATTN_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

template <class T>
struct Strided2D {
  T* data = nullptr;
  int64_t row_stride = 0, column_stride = 1;
  QATTN_HOST_DEVICE T& at(int64_t row, int64_t column) const { return data[row * row_stride + column * column_stride]; }
  QATTN_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

// Vectors of head_dim contiguous elements at three strided indices: [batch, token, head] for queries and outputs,
// [page, token, head] for caches, [1, token, head] for rows to append.
struct VectorArray {
  void* data = nullptr;
  int64_t outer_stride = 0, token_stride = 0, head_stride = 0;  // in elements

  QATTN_HOST_DEVICE int64_t offset(int64_t outer, int64_t token, int64_t head) const {
    return outer * outer_stride + token * token_stride + head * head_stride;
  }
  template <class T>
  QATTN_HOST_DEVICE T* at(int64_t outer, int64_t token, int64_t head) const {
    return static_cast<T*>(data) + offset(outer, token, head);
  }
};

// Where and how a call runs. Every pointer of the call lives on `device`.
struct Execution {
  Device device = {};
  void* stream = nullptr;        // cudaStream_t; unused on a CPU
  int num_threads = 0;           // CPU threads; 0: every core that this process may use
  std::string_view kernel = {};  // forces one kernel variant ("avx2", "tensor_cores"); empty: the backend's policy
};

}  // namespace quantattn
