#pragma once

#include "quantattn/decode.h"
#include "quantattn/hybrid.h"
#include "quantattn/merge.h"
#include "quantattn/prefill.h"
#include "quantattn/quantize.h"

// Checks of values behind the public structs. Tensor properties (dtype, shape, device) are the binding's to check.
namespace quantattn {

void validate(const DecodeParams& params, const Execution& execution);
void validate(const HybridParams& params, const Execution& execution);
void validate(const PrefillParams& params, const Execution& execution);
void validate(const CodecParams& params, std::string_view who);
void validate(const AppendParams& params, const Execution& execution);
void validate(const MergeParams& params);
void validate_head_dim(int head_dim, std::string_view who);

}  // namespace quantattn
