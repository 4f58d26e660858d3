#pragma once

#include "core/backend.h"

namespace quantattn::cuda {

void quantize(const CodecParams& params, const Execution& execution);
void dequantize(const CodecParams& params, const Execution& execution);
void append(const AppendParams& params, const Execution& execution);
void merge(const MergeParams& params, const Execution& execution);

}  // namespace quantattn::cuda
