#pragma once

#include "core/backend.h"

namespace quantattn::cpu {

void quantize(const CodecParams& params, const Execution& execution);
void dequantize(const CodecParams& params, const Execution& execution);
void append(const AppendParams& params, const Execution& execution);

}  // namespace quantattn::cpu
