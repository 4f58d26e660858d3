#pragma once

#include "core/backend.h"

namespace quantattn::cuda {

HybridPlan plan_hybrid(const HybridParams& params, const Execution& execution);
void run_hybrid(const HybridParams& params, const Execution& execution, const HybridPlan& plan, Workspace workspace);

}  // namespace quantattn::cuda
