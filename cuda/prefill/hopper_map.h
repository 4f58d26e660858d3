#pragma once

#include "prefill/hopper_task.h"

// How the copy engine of sm_90 brings K and V, and whether it can.
namespace quantattn::cuda {

// Chooses the boxes of a task and describes its K and V to the copy engine. False where strides, alignment or page size do not
// allow it, or where the driver offers no such description.
bool plan_copies(HopperTask& task, const HopperInstance& instance);

}  // namespace quantattn::cuda
