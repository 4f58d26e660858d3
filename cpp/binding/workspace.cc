#include "binding/workspace.h"

#include <memory>
#include <new>
#include <string>

#include "quantattn/error.h"

namespace quantattn::binding {
namespace {

constexpr std::align_val_t kAlignment{256};

struct AlignedDelete {
  void operator()(void* data) const { ::operator delete(data, kAlignment); }
};

// Without the stack of frames that torch puts after the first line.
void keep_message(void* context, const char* kind, const char* message) {
  const std::string_view text(message);
  *static_cast<std::string*>(context) = std::string(kind) + ": " + std::string(text.substr(0, text.find('\n')));
}

dlpack::ManagedTensor* allocate_bytes(std::string_view who, const dlpack::ExchangeApi& api, Device device, int64_t bytes) {
  int64_t shape = bytes, stride = 1;
  dlpack::Tensor prototype{.data = nullptr,
                           .device = {dlpack::kCuda, device.index},
                           .ndim = 1,
                           .dtype = {dlpack::kUInt, 8, 1},
                           .shape = &shape,
                           .strides = &stride,
                           .byte_offset = 0};
  dlpack::ManagedTensor* managed = nullptr;
  std::string error;
  if (api.allocate(&prototype, &managed, &error, keep_message) != 0)
    throw DeviceError(std::string(who) + ": " + std::to_string(bytes) + " bytes of scratch could not be allocated, got " +
                      error);
  return managed;
}

}  // namespace

void* cpu_scratch(int64_t bytes) {
  thread_local std::unique_ptr<void, AlignedDelete> buffer;
  thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    buffer.reset();
    capacity = 0;
    buffer.reset(::operator new(static_cast<size_t>(bytes), kAlignment));
    capacity = bytes;
  }
  return buffer.get();
}

CudaScratch::CudaScratch(std::string_view who, const Tensor& like, int64_t bytes) {
  if (bytes == 0) return;
  if (const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(like.object)); api != nullptr && api->allocate != nullptr) {
    managed_ = allocate_bytes(who, *api, like.device, bytes);
    data_ = static_cast<char*>(managed_->tensor.data) + managed_->tensor.byte_offset;
    return;
  }
  const py::module_ torch = py::module_::import("torch");
  tensor_ = torch.attr("empty")(bytes, py::arg("dtype") = torch.attr("uint8"),
                                py::arg("device") = py::handle(like.object).attr("device"));
  data_ = reinterpret_cast<void*>(tensor_.attr("data_ptr")().cast<uintptr_t>());
}

CudaScratch::~CudaScratch() {
  if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
}

#ifndef QATTN_HAS_CUDA
void* cuda_counters(Device, void*, int64_t) {
  throw Unsupported("arrival counters: this build of pyquantattn has no CUDA backend, got tensors on a CUDA device");
}
#endif

}  // namespace quantattn::binding
