#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>
#include <vector>

#include "binding/workspace.h"
#include "quantattn/error.h"

namespace quantattn::binding {
namespace {

constexpr int64_t kSlabBytes = 1 << 20, kSliceAlignment = 256;

void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess)
    throw DeviceError(std::string("arrival counters: ") + call + " must succeed, got " + cudaGetErrorString(status));
}

// Makes `device` current for a scope, and lets the scope allocate while any thread captures a graph.
class AllocationScope {
 public:
  explicit AllocationScope(int device) {
    check(cudaGetDevice(&previous_device_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    check(cudaThreadExchangeStreamCaptureMode(&capture_mode_), "cudaThreadExchangeStreamCaptureMode");
  }
  ~AllocationScope() {
    cudaThreadExchangeStreamCaptureMode(&capture_mode_);
    cudaSetDevice(previous_device_);
  }
  AllocationScope(const AllocationScope&) = delete;
  AllocationScope& operator=(const AllocationScope&) = delete;

 private:
  int previous_device_ = 0;
  cudaStreamCaptureMode capture_mode_ = cudaStreamCaptureModeRelaxed;
};

// Zeroed on a stream of its own: legal while the caller's stream captures, and no wait for the caller's work.
char* allocate_zeroed(int device, int64_t bytes) {
  const AllocationScope scope(device);
  void* data = nullptr;
  cudaStream_t stream = nullptr;
  check(cudaMalloc(&data, static_cast<size_t>(bytes)), "cudaMalloc");
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  const cudaError_t set = cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream);
  const cudaError_t done = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  check(set, "cudaMemsetAsync");
  check(done, "cudaStreamSynchronize");
  return static_cast<char*>(data);
}

// What remains of a device's current slab.
struct Slab {
  int device;
  char* next;
  int64_t bytes_left;
};

char* take_slice(int device, int64_t bytes) {
  static std::vector<Slab> slabs;
  const int64_t rounded = (bytes + kSliceAlignment - 1) / kSliceAlignment * kSliceAlignment;
  auto slab = std::find_if(slabs.begin(), slabs.end(), [&](const Slab& each) { return each.device == device; });
  if (slab == slabs.end()) slab = slabs.insert(slabs.end(), {device, nullptr, 0});
  if (slab->bytes_left < rounded) {
    const int64_t slab_bytes = std::max(kSlabBytes, rounded);
    *slab = {device, allocate_zeroed(device, slab_bytes), slab_bytes};
  }
  char* const slice = slab->next;
  slab->next += rounded;
  slab->bytes_left -= rounded;
  return slice;
}

// 0 outside a capture. The legacy default stream cannot capture, and asking it would disturb captures of other streams.
unsigned long long capture_id(cudaStream_t stream) {
  if (stream == nullptr) return 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(stream, &status, &id), "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

// The counters of a stream: one row outside captures, one for its latest capture.
struct StreamCounters {
  int device;
  void* stream;
  bool is_capture;
  unsigned long long capture;
  char* data;
  int64_t bytes;
};

}  // namespace

// Called with the GIL held, which guards the tables.
void* cuda_counters(Device device, void* stream, int64_t bytes) {
  static std::vector<StreamCounters> rows;
  const unsigned long long capture = capture_id(static_cast<cudaStream_t>(stream));
  const bool is_capture = capture != 0;
  auto row = std::find_if(rows.begin(), rows.end(), [&](const StreamCounters& each) {
    return each.device == device.index && each.stream == stream && each.is_capture == is_capture;
  });
  if (row == rows.end()) row = rows.insert(rows.end(), {device.index, stream, is_capture, capture, nullptr, 0});
  if (row->capture != capture || row->bytes < bytes)
    *row = {device.index, stream, is_capture, capture, take_slice(device.index, bytes), bytes};
  return row->data;
}

}  // namespace quantattn::binding
