#pragma once

#include "binding/tensor.h"

namespace quantattn::binding {

// Scratch of one CPU call: a buffer of the calling thread that only grows, 256-byte aligned. Valid until the thread's next
// call.
void* cpu_scratch(int64_t bytes);

// Scratch of one CUDA call, from torch's caching allocator on the current stream: eagerly its memory returns to that stream
// when the call has been queued; under graph capture it comes from the graph's own pool, so that replays own it.
class CudaScratch {
 public:
  CudaScratch(std::string_view who, const Tensor& like, int64_t bytes);
  ~CudaScratch();
  CudaScratch(const CudaScratch&) = delete;
  CudaScratch& operator=(const CudaScratch&) = delete;
  void* data() const { return data_; }

 private:
  dlpack::ManagedTensor* managed_ = nullptr;
  py::object tensor_;  // where torch has no exchange API
  void* data_ = nullptr;
};

// Zeroed arrival counters of one CUDA call, which the kernels leave zeroed. Calls that may run at the same time get different
// ones: one set for each (device, stream), and a set of its own for each graph capture, because a graph may be replayed on
// any stream beside eager calls and other graphs. The memory is never freed.
void* cuda_counters(Device device, void* stream, int64_t bytes);

}  // namespace quantattn::binding
