#pragma once

#include <span>

#include "core/backend.h"

namespace quantattn::cpu {

DecodePlan plan_decode(const DecodeParams& params, const Execution& execution, std::span<const DecodeKernel* const> candidates);
void run_decode(const DecodeParams& params, const Execution& execution, const DecodePlan& plan, Workspace workspace);

PrefillPlan plan_prefill(const PrefillParams& params, const Execution& execution);
void run_prefill(const PrefillParams& params, const Execution& execution, const PrefillPlan& plan, void* scratch);

HybridPlan plan_hybrid(const HybridParams& params, const Execution& execution);
void run_hybrid(const HybridParams& params, const Execution& execution, const HybridPlan& plan, Workspace workspace);

}  // namespace quantattn::cpu
