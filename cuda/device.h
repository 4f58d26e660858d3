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
  bool has_dependent_launch;   // a kernel may start while the one before it ends (sm_90 and newer)
  bool is_hopper;              // compute capability 9.0: runs code for sm_90a
};
const DeviceLimits& device_limits(int index, std::string_view who);

inline cudaStream_t stream_of(const Execution& execution) { return static_cast<cudaStream_t>(execution.stream); }

BackendInfo describe();
bool has_usable_device();  // compute capability 8.0 or newer
bool has_hopper_device();

}  // namespace quantattn::cuda
