#pragma once

// The compiler's baseline for the target: no instruction beyond what every machine of the architecture has.
namespace quantattn::cpu::scalar {

inline constexpr int kLanes = 4;

// No vector instructions; the types are named for Clang 14, which takes a missing one for an error where others see a
// requirement that is not met.
struct Native {
  struct Vector {};
  struct Halves {};
};

}  // namespace quantattn::cpu::scalar
