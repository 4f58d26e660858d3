#pragma once

#include "cpu/simd.h"
#include "cpu/stages.h"

// Unpacking of a tile of codes into a matrix operand, from Format::decode alone: right for every format.
namespace quantattn::cpu::QATTN_ISA {

template <class Format>
struct Unpack {
  using Code = typename Format::Code;

  static void keys(const CodeTile& tile, int head_dim, Operand* operand) {
    operand->arithmetic = Arithmetic::kFloat32;
    operand->step_stride = kLanes * 4;
    operand->vector_stride = int64_t{head_dim} * kLanes * 4;
    auto* out = static_cast<float*>(operand->data);
    for (int first = 0; first < tile.num_tokens; first += kLanes, out += head_dim * kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool is_token = first + lane < tile.num_tokens;
        const auto* codes = static_cast<const Code*>(tile.rows[is_token ? first + lane : first]);
        for (int i = 0; i < head_dim; ++i) out[i * kLanes + lane] = is_token ? Format::decode(codes[i]) : 0.f;
      }
  }

  static void values(const CodeTile& tile, int head_dim, Operand* operand) {
    const int num_columns = round_up(head_dim, kLanes);
    operand->arithmetic = Arithmetic::kFloat32;
    operand->step_stride = int64_t{num_columns} * 4;
    operand->vector_stride = kLanes * 4;
    auto* out = static_cast<float*>(operand->data);
    for (int token = 0; token < tile.num_tokens; ++token, out += num_columns) {
      const auto* codes = static_cast<const Code*>(tile.rows[token]);
      for (int i = 0; i < head_dim; ++i) out[i] = Format::decode(codes[i]);
      for (int i = head_dim; i < num_columns; ++i) out[i] = 0.f;
    }
  }
};

}  // namespace quantattn::cpu::QATTN_ISA
