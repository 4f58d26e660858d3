#pragma once

#include <optional>
#include <span>

#include "prefill/hopper_task.h"

namespace quantattn::cuda {

// The Hopper kernels for K and V of one format, sorted by head_dim; where the build has code for sm_90a.
std::span<const HopperInstance> hopper_instances(KvFormat format);

// Whether the build has these kernels and a device of this machine runs them.
bool runs_hopper();

// A task as the Hopper kernel takes it.
struct HopperLaunch {
  const HopperInstance* instance;
  HopperTask task;
};
// Nothing where there is no kernel for the device and the formats, or where the copy engine cannot read the tensors
// (alignment, page sizes).
std::optional<HopperLaunch> plan_hopper(const PrefillTask& task, KvPair format, const Execution& execution,
                                        std::string_view who);
void run_hopper(const HopperLaunch& launch, int num_kv_heads, const Execution& execution, std::string_view who);

}  // namespace quantattn::cuda
