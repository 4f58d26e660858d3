#pragma once

#include <span>

#include "quantattn/decode.h"
#include "quantattn/hybrid.h"
#include "quantattn/merge.h"
#include "quantattn/prefill.h"
#include "quantattn/quantize.h"
#include "quantattn/runtime.h"

namespace quantattn {

// One decoding kernel of one backend: a row of the registry.
struct DecodeKernel {
  std::string_view backend, variant;
  KvPair format;
  int min_head_dim, max_head_dim, head_dim_multiple;
  bool (*runs_here)();
  void (*run)(const DecodeParams&, const Execution&, const DecodePlan&, Workspace);

  bool serves(KvPair pair, int head_dim) const {
    return format == pair && head_dim >= min_head_dim && head_dim <= max_head_dim && head_dim % head_dim_multiple == 0;
  }
};

// One kernel for fresh K and V of one backend.
struct PrefillKernel {
  std::string_view backend, variant;
  DType format;
  int min_head_dim, max_head_dim, head_dim_multiple;
  bool (*runs_here)();

  bool serves(DType dtype, int head_dim) const {
    return format == dtype && head_dim >= min_head_dim && head_dim <= max_head_dim && head_dim % head_dim_multiple == 0;
  }
};

// Everything that a backend gives to the core: constant tables and functions, no objects. The core has validated the
// arguments of every call.
struct Backend {
  DeviceKind device;
  BackendInfo (*describe)();  // slow: it asks the operating system or the driver
  std::span<const DecodeKernel> (*decode_kernels)();
  // Fills splits and workspace sizes and picks one of `candidates`: rows that serve the format and head_dim, run here and
  // have the variant that the caller forced, if any. Never empty.
  DecodePlan (*plan_decode)(const DecodeParams&, const Execution&, std::span<const DecodeKernel* const> candidates);
  void (*quantize)(const CodecParams&, const Execution&);
  void (*dequantize)(const CodecParams&, const Execution&);
  void (*append)(const AppendParams&, const Execution&);
  void (*merge)(const MergeParams&, const Execution&);

  // Null where the backend has no kernels for the operation. Some kernel serves the shape, runs here and has the forced
  // variant.
  std::span<const PrefillKernel> (*prefill_kernels)() = nullptr;
  PrefillPlan (*plan_prefill)(const PrefillParams&, const Execution&) = nullptr;
  void (*run_prefill)(const PrefillParams&, const Execution&, const PrefillPlan&, void* scratch) = nullptr;
  // A backend with these serves a hybrid batch wherever it has a decoding kernel.
  HybridPlan (*plan_hybrid)(const HybridParams&, const Execution&) = nullptr;
  void (*run_hybrid)(const HybridParams&, const Execution&, const HybridPlan&, Workspace) = nullptr;
};

// The backend of a device; throws Unsupported where this build has none.
const Backend& backend_of(DeviceKind device, std::string_view who);
std::span<const Backend* const> all_backends();

}  // namespace quantattn
