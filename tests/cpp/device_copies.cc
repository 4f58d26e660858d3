#include "device_copies.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace quantattn_test {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace

DeviceCopies::~DeviceCopies() {
  for (void* allocation : allocations_) cudaFree(allocation);
}

void* DeviceCopies::allocate(size_t size, unsigned char byte) {
  if (size == 0) return nullptr;
  void* data = nullptr;
  check(cudaMalloc(&data, size), "cudaMalloc");
  allocations_.push_back(data);
  check(cudaMemset(data, byte, size), "cudaMemset");
  return data;
}

void DeviceCopies::add(const void* host, size_t size) {
  void* device = allocate(size, 0);
  check(cudaMemcpy(device, host, size, cudaMemcpyHostToDevice), "cudaMemcpy to the device");
  copies_.push_back({reinterpret_cast<uintptr_t>(host), size, static_cast<char*>(device)});
}

void DeviceCopies::fetch(void* host, size_t size) const {
  check(cudaMemcpy(host, at(host), size, cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
}

const char* DeviceCopies::find(uintptr_t host) const {
  if (host == 0) return nullptr;
  for (const Copy& copy : copies_)
    if (host >= copy.host && host < copy.host + copy.size) return copy.device + (host - copy.host);
  throw std::logic_error("an array has no copy on the device");
}

}  // namespace quantattn_test
