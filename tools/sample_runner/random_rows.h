#pragma once

#include <cstdint>
#include <span>

namespace sample_runner {

// A 64-bit hash of two words (the finaliser of Steele et al., SplitMix, OOPSLA 2014): equal seeds give equal data on every
// machine, and any row can be made again without the rows before it.
uint64_t mix(uint64_t seed, uint64_t word);

// Standard normal numbers (Box and Muller, 1958) that depend on `seed` and their index alone.
void fill_normal(uint64_t seed, std::span<float> values);

}  // namespace sample_runner
