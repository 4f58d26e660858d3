#include "quantattn/runtime.h"

#include <sys/mman.h>

#include "binding/arguments.h"
#include "binding/attention_run.h"
#include "binding/operations.h"

namespace quantattn::binding {
namespace {

std::string device_name(DeviceKind device) { return device == DeviceKind::kCpu ? "cpu" : "cuda"; }

py::list kv_formats() {
  py::list rows;
  for (const KvFormatInfo& row : kKvFormats)
    rows.append(py::make_tuple(std::string(row.name), std::string(name(code_type(row.format))), row.code_bits, row.has_scale));
  return rows;
}

py::list kv_pair_names() {
  py::list rows;
  for (KvPair pair : kv_pairs())
    rows.append(py::make_tuple(std::string(name(pair)), std::string(name(pair.k)), std::string(name(pair.v))));
  return rows;
}

py::list backends() {
  py::list rows;
  for (const BackendInfo& row : built_backends())
    rows.append(py::make_tuple(std::string(row.name), device_name(row.device), row.num_devices, row.status));
  return rows;
}

py::list decode_kernels() {
  py::list rows;
  for (const KernelInfo& row : built_decode_kernels())
    rows.append(py::make_tuple(std::string(row.backend), std::string(row.variant), std::string(name(row.format)),
                               row.min_head_dim, row.max_head_dim, row.head_dim_multiple, row.runs_here));
  return rows;
}

py::list prefill_kernels() {
  py::list rows;
  for (const PrefillKernelInfo& row : built_prefill_kernels())
    rows.append(py::make_tuple(std::string(row.backend), std::string(row.variant), std::string(name(row.dtype)),
                               row.min_head_dim, row.max_head_dim, row.head_dim_multiple, row.runs_here));
  return rows;
}

DeviceKind device_kind(const std::string& device) { return device == "cuda" ? DeviceKind::kCuda : DeviceKind::kCpu; }

bool supports_decode_names(const std::string& device, const std::string& kv_format, int head_dim, int num_q_tokens) {
  const std::optional<KvPair> pair = parse_kv_pair(kv_format);
  return pair.has_value() && supports_decode(device_kind(device), *pair, head_dim, num_q_tokens);
}

bool supports_hybrid_names(const std::string& device, const std::string& kv_format, int head_dim) {
  const std::optional<KvPair> pair = parse_kv_pair(kv_format);
  return pair.has_value() && supports_hybrid(device_kind(device), *pair, head_dim);
}

bool supports_prefill_names(const std::string& device, const std::string& dtype, int head_dim) {
  for (DType type : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    if (name(type) == dtype) return supports_prefill(device_kind(device), type, head_dim);
  return false;
}

// Asks the operating system to back memory that nobody has touched yet with huge pages; it may decline.
void advise_huge_pages(uintptr_t address, uintptr_t num_bytes) {
  constexpr uintptr_t kPage = 4096, kHugePage = 2 << 20;
  const uintptr_t first = (address + kPage - 1) / kPage * kPage, end = (address + num_bytes) / kPage * kPage;
#ifdef MADV_HUGEPAGE
  if (end > first && end - first >= kHugePage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

void define_runtime(py::module_& module) {
  module.def("version", [] { return std::string(version()); });
  module.def("kv_formats", &kv_formats);
  module.def("kv_pairs", &kv_pair_names);
  module.def("backends", &backends);
  module.def("decode_kernels", &decode_kernels);
  module.def("prefill_kernels", &prefill_kernels);
  module.def("supports_decode", &supports_decode_names);
  module.def("supports_hybrid", &supports_hybrid_names);
  module.def("supports_prefill", &supports_prefill_names);
  module.def("get_num_threads", &get_num_threads);
  module.def("set_num_threads", &set_num_threads);
  module.def("set_forced_kernel", &set_forced_kernel);
  module.def("forced_kernel", &forced_kernel);
  module.def("last_kernel", &last_kernel);
  module.def("set_exchange_api_enabled", &set_exchange_api_enabled);
  module.def("advise_huge_pages", &advise_huge_pages);
  module.def("uses_exchange_api", [](py::handle tensor) { return exchange_api(Py_TYPE(tensor.ptr())) != nullptr; });
}

}  // namespace quantattn::binding
