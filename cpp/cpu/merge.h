#pragma once

#include "core/backend.h"

namespace quantattn::cpu {

void merge(const MergeParams& params, const Execution& execution);

}  // namespace quantattn::cpu
