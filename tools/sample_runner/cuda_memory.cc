#include <cuda_runtime_api.h>

#include <new>
#include <string>

#include "device_memory.h"
#include "quantattn/error.h"

namespace sample_runner {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaErrorMemoryAllocation) throw std::bad_alloc();
  if (status != cudaSuccess)
    throw quantattn::DeviceError(std::string(what) + ": must succeed, got " + cudaGetErrorString(status));
}

class CudaEvent {
 public:
  CudaEvent() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~CudaEvent() { cudaEventDestroy(event_); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class CudaMemory final : public DeviceMemory {
 public:
  explicit CudaMemory(int index) { check(cudaSetDevice(index), "cudaSetDevice"); }
  void* allocate(size_t bytes) override {
    void* data = nullptr;
    check(cudaMalloc(&data, bytes), "cudaMalloc");
    return data;
  }
  void release(void* data) override { cudaFree(data); }
  void fill(void* data, unsigned char byte, size_t bytes) override { check(cudaMemset(data, byte, bytes), "cudaMemset"); }
  void write(void* to, const void* from_host, size_t bytes) override {
    check(cudaMemcpy(to, from_host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy to the device");
  }
  void read(void* to_host, const void* from, size_t bytes) override {
    check(cudaMemcpy(to_host, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
  }
  double time_ms(const std::function<void()>& step) override {
    check(cudaEventRecord(start_.get()), "cudaEventRecord");
    step();
    check(cudaEventRecord(stop_.get()), "cudaEventRecord");
    check(cudaEventSynchronize(stop_.get()), "cudaEventSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start_.get(), stop_.get()), "cudaEventElapsedTime");
    return milliseconds;
  }

 private:
  CudaEvent start_, stop_;
};

}  // namespace

std::unique_ptr<DeviceMemory> open_cuda_device(int index) {
  int num_devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&num_devices);
  if (status != cudaSuccess || index >= num_devices)
    throw quantattn::Unsupported("--device cuda: the index must be below the number of usable GPUs (" +
                                 std::to_string(num_devices) + ": " + cudaGetErrorString(status) + "), got " +
                                 std::to_string(index));
  return std::make_unique<CudaMemory>(index);
}

}  // namespace sample_runner
