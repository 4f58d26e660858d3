#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace quantattn_test {

// Copies of host arrays in the memory of the current GPU, and the addresses there.
class DeviceCopies {
 public:
  DeviceCopies() = default;
  ~DeviceCopies();
  DeviceCopies(const DeviceCopies&) = delete;
  DeviceCopies& operator=(const DeviceCopies&) = delete;

  template <class T>
  void add(const std::vector<T>& array) {
    if (!array.empty()) add(array.data(), array.size() * sizeof(T));
  }
  // `size` bytes of which each is `byte`.
  void* allocate(size_t size, unsigned char byte);
  // Waits for the device and copies an array back.
  template <class T>
  void fetch(std::vector<T>& array) const {
    if (!array.empty()) fetch(array.data(), array.size() * sizeof(T));
  }
  // Where the copy of what lies at a host address lies; null stays null.
  template <class T>
  T* at(T* host) const {
    return const_cast<T*>(reinterpret_cast<const T*>(find(reinterpret_cast<uintptr_t>(host))));
  }

 private:
  struct Copy {
    uintptr_t host;
    size_t size;
    char* device;
  };
  void add(const void* host, size_t size);
  void fetch(void* host, size_t size) const;
  const char* find(uintptr_t host) const;

  std::vector<Copy> copies_;
  std::vector<void*> allocations_;
};

}  // namespace quantattn_test
