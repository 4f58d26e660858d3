#pragma once

// The compiler's baseline for the target: no instruction beyond what every machine of the architecture has.
namespace quantattn::cpu::scalar {

inline constexpr int kLanes = 4;

struct Native {};

}  // namespace quantattn::cpu::scalar
