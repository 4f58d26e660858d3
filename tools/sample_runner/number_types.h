#pragma once

#include <cstdint>
#include <span>

#include "quantattn/kv_format.h"
#include "quantattn/types.h"

// What the bits of each stored type mean, from their definitions and in float64: the runner's reference must not share
// code with the library that it checks.
namespace sample_runner {

// The number that each code stands for, indexed by the code's bits: 2^8 or 2^16 entries.
std::span<const double> code_values(quantattn::KvFormat format);
// The largest finite number among them that has a negative twin: 127, 448, ...
double max_code(quantattn::KvFormat format);

double decode(quantattn::DType dtype, const void* data, int64_t index);
// Rounds to nearest even.
void encode(quantattn::DType dtype, float value, void* data, int64_t index);

}  // namespace sample_runner
