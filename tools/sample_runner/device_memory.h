#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "quantattn/types.h"

namespace sample_runner {

// What the runner needs of a device beside the library: memory, copies and a clock.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual void* allocate(size_t bytes) = 0;  // 256-byte aligned; throws std::bad_alloc
  virtual void release(void* data) = 0;
  virtual void fill(void* data, unsigned char byte, size_t bytes) = 0;
  virtual void write(void* to, const void* from_host, size_t bytes) = 0;
  virtual void read(void* to_host, const void* from, size_t bytes) = 0;
  // Milliseconds from the start of `step` to the end of everything it launched.
  virtual double time_ms(const std::function<void()>& step) = 0;
};

// Throws quantattn::Unsupported where this build or this machine lacks the device.
std::unique_ptr<DeviceMemory> open_device(quantattn::Device device);
std::unique_ptr<DeviceMemory> open_cuda_device(int index);  // cuda_memory.cc, or no_cuda_memory.cc in a build without CUDA

// Device memory with an owner.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DeviceMemory& memory, size_t bytes, unsigned char filled_with) : memory_(&memory), bytes_(bytes) {
    data_ = memory.allocate(bytes > 0 ? bytes : 1);
    memory.fill(data_, filled_with, bytes);
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) memory_->release(data_);
  }

  template <class T>
  static Buffer of(DeviceMemory& memory, std::span<const T> values) {
    Buffer buffer(memory, values.size_bytes(), 0);
    memory.write(buffer.data_, values.data(), values.size_bytes());
    return buffer;
  }
  template <class T>
  std::vector<T> read() const {
    std::vector<T> values(bytes_ / sizeof(T));
    memory_->read(values.data(), data_, values.size() * sizeof(T));
    return values;
  }
  void write(std::span<const std::byte> bytes) { memory_->write(data_, bytes.data(), bytes.size()); }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t size() const { return bytes_; }

 private:
  void swap(Buffer& other) {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  DeviceMemory* memory_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace sample_runner
