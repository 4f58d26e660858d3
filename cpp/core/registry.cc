#include <vector>

#include "core/backend.h"
#include "core/fail.h"

namespace quantattn {

// generated/backends.def has one row QATTN_BACKEND(name) for each backend of this build.
#define QATTN_BACKEND(id) const Backend& id##_backend();
#include "generated/backends.def"
#undef QATTN_BACKEND

std::span<const Backend* const> all_backends() {
  static const std::vector<const Backend*> backends = {
#define QATTN_BACKEND(id) &id##_backend(),
#include "generated/backends.def"
#undef QATTN_BACKEND
  };
  return backends;
}

const Backend& backend_of(DeviceKind device, std::string_view who) {
  for (const Backend* backend : all_backends())
    if (backend->device == device) return *backend;
  fail<Unsupported>(who,
                    ": this build of quantattn has no CUDA backend, got tensors on a CUDA device; rebuild with nvcc on the "
                    "PATH and -DQATTN_CUDA=ON");
}

namespace {

std::span<const PrefillKernel> prefill_kernels_of(const Backend& backend) {
  return backend.prefill_kernels ? backend.prefill_kernels() : std::span<const PrefillKernel>{};
}

}  // namespace

std::vector<KernelInfo> built_decode_kernels() {
  std::vector<KernelInfo> rows;
  for (const Backend* backend : all_backends())
    for (const DecodeKernel& kernel : backend->decode_kernels())
      rows.push_back({kernel.backend, kernel.variant, kernel.format, kernel.min_head_dim, kernel.max_head_dim,
                      kernel.head_dim_multiple, kernel.runs_here()});
  return rows;
}

std::vector<PrefillKernelInfo> built_prefill_kernels() {
  std::vector<PrefillKernelInfo> rows;
  for (const Backend* backend : all_backends())
    for (const PrefillKernel& kernel : prefill_kernels_of(*backend))
      rows.push_back({kernel.backend, kernel.variant, kernel.format, kernel.min_head_dim, kernel.max_head_dim,
                      kernel.head_dim_multiple, kernel.runs_here()});
  return rows;
}

std::vector<BackendInfo> built_backends() {
  std::vector<BackendInfo> rows;
  for (const Backend* backend : all_backends()) rows.push_back(backend->describe());
  return rows;
}

namespace {

// Whether a usable backend of the device has a row for the shape in the table that `kernels_of` finds.
template <class Format, class KernelsOf>
bool has_kernel(DeviceKind device, Format format, int head_dim, const KernelsOf& kernels_of) {
  for (const Backend* backend : all_backends()) {
    if (backend->device != device || backend->describe().num_devices == 0) continue;
    for (const auto& kernel : kernels_of(*backend))
      if (kernel.runs_here() && kernel.serves(format, head_dim)) return true;
  }
  return false;
}

}  // namespace

bool supports_decode(DeviceKind device, KvPair format, int head_dim, int num_q_tokens) {
  return num_q_tokens >= 1 && num_q_tokens <= kMaxDecodeTokens &&
         has_kernel(device, format, head_dim, [](const Backend& backend) { return backend.decode_kernels(); });
}

bool supports_prefill(DeviceKind device, DType dtype, int head_dim) {
  return has_kernel(device, dtype, head_dim, prefill_kernels_of);
}

bool supports_hybrid(DeviceKind device, KvPair format, int head_dim) {
  return has_kernel(device, format, head_dim, [](const Backend& backend) {
    return backend.plan_hybrid ? backend.decode_kernels() : std::span<const DecodeKernel>{};
  });
}

std::string_view version() { return QATTN_VERSION; }

}  // namespace quantattn
