#include <chrono>
#include <cstring>
#include <new>

#include "device_memory.h"
#include "quantattn/error.h"

namespace sample_runner {
namespace {

constexpr std::align_val_t kAlignment{256};

class HostMemory final : public DeviceMemory {
 public:
  void* allocate(size_t bytes) override { return ::operator new(bytes, kAlignment); }
  void release(void* data) override { ::operator delete(data, kAlignment); }
  void fill(void* data, unsigned char byte, size_t bytes) override { std::memset(data, byte, bytes); }
  void write(void* to, const void* from_host, size_t bytes) override { copy(to, from_host, bytes); }
  void read(void* to_host, const void* from, size_t bytes) override { copy(to_host, from, bytes); }
  double time_ms(const std::function<void()>& step) override {
    const auto start = std::chrono::steady_clock::now();
    step();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  // Empty ranges may be null, which memcpy must not see.
  static void copy(void* to, const void* from, size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
};

}  // namespace

std::unique_ptr<DeviceMemory> open_device(quantattn::Device device) {
  if (device.kind == quantattn::DeviceKind::kCuda) return open_cuda_device(device.index);
  return std::make_unique<HostMemory>();
}

}  // namespace sample_runner
