#include "device.h"

#include <array>
#include <mutex>
#include <string>

#include "core/fail.h"

namespace quantattn::cuda {
namespace {

constexpr int kMaxDevices = 64, kMinMajor = 8;

struct Devices {
  int count = 0;       // that the driver offers
  int num_usable = 0;  // of compute capability 8.0 or newer
  int num_hopper = 0;  // of 9.0
  std::string status;
};

Devices find_devices() {
  Devices devices;
  const cudaError_t status = cudaGetDeviceCount(&devices.count);
  if (status != cudaSuccess || devices.count == 0) {
    (void)cudaGetLastError();  // having no GPU is an answer here, not an error for the next call to find
    devices.count = 0;
    devices.status = std::string("no usable GPU: ") + (status == cudaSuccess ? "none is visible" : cudaGetErrorString(status));
    return devices;
  }
  for (int i = 0; i < devices.count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    devices.num_usable += properties.major >= kMinMajor;
    devices.num_hopper += properties.major == 9 && properties.minor == 0;
    devices.status += (i == 0 ? "" : ", ") + std::string(properties.name) + " (sm_" +
                      std::to_string(properties.major * 10 + properties.minor) + ")";
  }
  if (devices.num_usable == 0)
    devices.status = "no usable GPU: compute capability 8.0 or newer is needed, found " + devices.status;
  return devices;
}

const Devices& devices() {
  static const Devices found = find_devices();
  return found;
}

}  // namespace

void check(cudaError_t status, std::string_view who, std::string_view what) {
  if (status == cudaSuccess) [[likely]]
    return;
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
    fail<Unsupported>(who, ": this build must contain code for the GPU, got ", devices().status,
                      "; rebuild with its architecture");
  fail<DeviceError>(who, ": ", what, " must succeed, got CUDA error ", cudaGetErrorName(status), " (",
                    cudaGetErrorString(status), ")");
}

DeviceScope::DeviceScope(int index, std::string_view who) {
  int current = 0;
  check(cudaGetDevice(&current), who, "finding the current device");
  if (current == index) return;
  check(cudaSetDevice(index), who, "selecting the device");
  previous_ = current;
}

DeviceScope::~DeviceScope() {
  if (previous_ >= 0) (void)cudaSetDevice(previous_);
}

const DeviceLimits& device_limits(int index, std::string_view who) {
  static std::array<DeviceLimits, kMaxDevices> limits;
  static std::array<std::once_flag, kMaxDevices> read;
  require(index >= 0 && index < kMaxDevices, who, ": device index must be in [0, ", kMaxDevices, "), got ", index);
  std::call_once(read[static_cast<size_t>(index)], [&] {
    DeviceLimits& found = limits[static_cast<size_t>(index)];
    check(cudaDeviceGetAttribute(&found.num_multiprocessors, cudaDevAttrMultiProcessorCount, index), who, "reading the device");
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), who, "reading the device");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), who, "reading the device");
    found.is_hopper = major == 9 && minor == 0;
    check(cudaDeviceGetAttribute(&found.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), who,
          "reading the device");
  });
  return limits[static_cast<size_t>(index)];
}

bool waits_for_previous(const void* kernel, int device, std::string_view who) {
  static std::array<bool, kMaxDevices> waits;
  static std::array<std::once_flag, kMaxDevices> read;
  std::call_once(read[static_cast<size_t>(device)], [&] {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), who, "reading a kernel");
    waits[static_cast<size_t>(device)] = attributes.ptxVersion >= 90;
  });
  return waits[static_cast<size_t>(device)];
}

BackendInfo describe() {
  return {"cuda", DeviceKind::kCuda, devices().num_usable == 0 ? 0 : devices().count, devices().status};
}

bool has_usable_device() { return devices().num_usable > 0; }
bool has_hopper_device() { return devices().num_hopper > 0; }

}  // namespace quantattn::cuda
