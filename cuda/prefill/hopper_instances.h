#pragma once

#include <span>

#include "prefill/hopper_task.h"

namespace quantattn::cuda {

// The Hopper kernels for K and V of one format, sorted by head_dim; where the build has code for sm_90a.
std::span<const HopperInstance> hopper_instances(KvFormat format);

// Starts the Hopper kernel for a task. False where there is none for the device and the formats, or where the copy engine
// cannot read the tensors (alignment, page sizes); nothing has happened then.
bool launch_hopper(const PrefillTask& task, KvPair format, int num_kv_heads, const Execution& execution, std::string_view who);

}  // namespace quantattn::cuda
