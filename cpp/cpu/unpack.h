#pragma once

#include "cpu/float32_direct.h"

// Unpacking of a tile of codes into a float32 operand: right for every format.
namespace quantattn::cpu::QATTN_ISA {

template <class Format>
struct Float32Unpack {
  using Code = typename Format::Code;
  static constexpr bool kRounds = false;
  static constexpr int kCodeBytes = static_cast<int>(sizeof(Code));

  static void keys(const CodeTile& tile, int head_dim, float, Operand* operand) {
    operand->arithmetic = Arithmetic::kFloat32;
    operand->unit = Widen<Format>::kUnit;
    operand->step_stride = kLanes * 4;
    operand->vector_stride = int64_t{head_dim} * kLanes * 4;
    auto* out = static_cast<float*>(operand->data);
    for (int first = 0; first < tile.num_tokens; first += kLanes)
      for (int i = 0; i < head_dim; i += kLanes) {
        I32 rows[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
          const auto* codes = reinterpret_cast<const Code*>(tile.row(first + lane));
          rows[lane] = bits<I32>(load_some<Format>(codes + i, head_dim - i));
          tile.prefetch(first + lane, i * kCodeBytes, kLanes * kCodeBytes);
        }
        transpose(rows);
      // A last partial vector writes past its rows, where the next vector of tokens or spare room follows.
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) store(out + lane * kLanes, bits<F32>(rows[lane]));
        out += (head_dim - i < kLanes ? head_dim - i : kLanes) * kLanes;
      }
  }

  static void values(const CodeTile& tile, int head_dim, bool, Operand* operand) {
    const int num_columns = round_up(head_dim, kLanes);
    operand->arithmetic = Arithmetic::kFloat32;
    operand->unit = Widen<Format>::kUnit;
    operand->step_stride = int64_t{num_columns} * 4;
    operand->vector_stride = kLanes * 4;
    auto* out = static_cast<float*>(operand->data);
    F32 zero = {};  // NaN after an element that is not finite
    for (int token = 0; token < tile.num_tokens; ++token, out += num_columns) {
      const auto* codes = reinterpret_cast<const Code*>(tile.row(token));
      for (int i = 0; i < head_dim; i += kLanes) {
        const F32 value = load_some<Format>(codes + i, head_dim - i);
        store(out + i, value);
        zero += value * 0.f;
        tile.prefetch(token, i * kCodeBytes, kLanes * kCodeBytes);
      }
    }
    operand->is_finite = sum_of_lanes(zero) == 0.f;
  }
};

// What an instruction set does with a format; specialised where integers are faster.
template <class Format>
struct Unpack : Float32Unpack<Format> {};
template <class Format>
struct Direct : Float32Direct<Format> {};

}  // namespace quantattn::cpu::QATTN_ISA
