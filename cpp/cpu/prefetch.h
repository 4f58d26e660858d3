#pragma once

#include "cpu/simd.h"
#include "cpu/stages.h"

namespace quantattn::cpu::QATTN_ISA {

inline constexpr int kLineBytes = 64;

// While `width` bytes at `byte` of a row are unpacked, asks for the same bytes of the next tile's row: tiles are scattered
// over pages, where the hardware's prefetcher does not follow.
QATTN_INLINE void prefetch(const CodeTile& next, int token, int byte, int width) {
  if (width >= kLineBytes || byte % kLineBytes == 0) __builtin_prefetch(next.row(token) + byte);
}

}  // namespace quantattn::cpu::QATTN_ISA
