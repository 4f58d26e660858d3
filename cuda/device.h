#pragma once

#include <cuda_runtime_api.h>

#include <string_view>

#include "core/backend.h"

// The CUDA runtime, as far as the backend needs it on the host.
namespace quantattn::cuda {

// Throws DeviceError: "who: what failed, got <CUDA's message>".
void check(cudaError_t status, std::string_view who, std::string_view what);

// Makes a device current for a scope and puts the caller's back.
class DeviceScope {
 public:
  DeviceScope(int index, std::string_view who);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = -1;  // -1: the device was current already
};

struct DeviceLimits {
  int num_multiprocessors;
  int shared_bytes_per_block;  // the most that a kernel may ask for
  bool is_hopper;              // compute capability 9.0: runs code for sm_90a
};
const DeviceLimits& device_limits(int index, std::string_view who);

// Whether this build's code for a device waits for the kernel before it in the stream, so that it may take its place early;
// see wait_for_previous(). `kernel` is any of those compiled for all architectures of the build. Code for sm_90 and newer
// waits; a GPU may also run what its driver made of PTX for older ones.
bool waits_for_previous(const void* kernel, int device, std::string_view who);

inline cudaStream_t stream_of(const Execution& execution) { return static_cast<cudaStream_t>(execution.stream); }

BackendInfo describe();
bool has_usable_device();  // compute capability 8.0 or newer
bool has_hopper_device();

}  // namespace quantattn::cuda
