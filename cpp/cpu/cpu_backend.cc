#include <sstream>
#include <vector>

#include "core/backend.h"
#include "cpu/attention.h"
#include "cpu/codec.h"
#include "cpu/isa_table.h"
#include "cpu/merge.h"
#include "cpu/thread_pool.h"

namespace quantattn {
namespace cpu {
namespace {

BackendInfo describe() {
  std::ostringstream status;
  status << "instruction sets:";
  for (const Isa& isa : isas()) status << " " << isa.name << (isa.runs_here() ? "" : " (built, not runnable here)");
  status << "; " << num_usable_cores() << " cores";
  return {"cpu", DeviceKind::kCpu, 1, status.str()};
}

std::span<const DecodeKernel> decode_kernels() {
  static const std::vector<DecodeKernel> rows = [] {
    std::vector<DecodeKernel> all;
    for (KvPair pair : kv_pairs())
      for (const Isa& isa : isas())
        all.push_back({"cpu", isa.name, pair, kMinHeadDim, kMaxHeadDim, kHeadDimMultiple, isa.runs_here, run_decode});
    return all;
  }();
  return rows;
}

std::span<const PrefillKernel> prefill_kernels() {
  static const std::vector<PrefillKernel> rows = [] {
    std::vector<PrefillKernel> all;
    for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      for (const Isa& isa : isas())
        all.push_back({"cpu", isa.name, dtype, kMinHeadDim, kMaxHeadDim, kHeadDimMultiple, isa.runs_here});
    return all;
  }();
  return rows;
}

}  // namespace
}  // namespace cpu

const Backend& cpu_backend() {
  static constexpr Backend backend = {DeviceKind::kCpu,     cpu::describe,     cpu::decode_kernels, cpu::plan_decode,
                                      cpu::quantize,        cpu::dequantize,   cpu::append,         cpu::merge,
                                      cpu::prefill_kernels, cpu::plan_prefill, cpu::run_prefill,    cpu::plan_hybrid,
                                      cpu::run_hybrid};
  return backend;
}

}  // namespace quantattn
