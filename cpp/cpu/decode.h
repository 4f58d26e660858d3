#pragma once

#include "core/backend.h"

namespace quantattn::cpu {

// Where the items and the partial results of a sequence start.
struct SequencePosition {
  int64_t first_item, first_partial;
  int64_t num_parts;
};

void run_decode(const DecodeParams& params, const Execution& execution, const DecodePlan& plan, Workspace workspace);

}  // namespace quantattn::cpu
