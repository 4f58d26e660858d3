#pragma once

#include <string>
#include <vector>

#include "quantattn/decode.h"

namespace quantattn {

// What this build contains and what this machine can run.
struct KernelInfo {
  std::string_view backend, variant;
  KvPair format;
  int min_head_dim, max_head_dim, head_dim_multiple;  // head_dim values that the row serves
  bool runs_here;                                     // the machine has the instruction set or the device
};
QATTN_API std::vector<KernelInfo> built_decode_kernels();

struct PrefillKernelInfo {
  std::string_view backend, variant;
  DType dtype;                                        // of q, and of fresh K and V
  int min_head_dim, max_head_dim, head_dim_multiple;  // head_dim values that the row serves
  bool runs_here;
};
QATTN_API std::vector<PrefillKernelInfo> built_prefill_kernels();

struct BackendInfo {
  std::string_view name;
  DeviceKind device;
  int num_devices;     // usable by this process now; 0: none, `status` says why
  std::string status;  // one sentence: the CPU's instruction sets, the GPU's name, or what is missing
};
QATTN_API std::vector<BackendInfo> built_backends();

// True where plan_decode_attention would find a kernel: the same look-up.
QATTN_API bool supports_decode(DeviceKind device, KvPair format, int head_dim, int num_q_tokens);
// The same for plan_prefill_attention and plan_hybrid_attention.
QATTN_API bool supports_prefill(DeviceKind device, DType dtype, int head_dim);
QATTN_API bool supports_hybrid(DeviceKind device, KvPair format, int head_dim);

QATTN_API std::string_view version();

}  // namespace quantattn
