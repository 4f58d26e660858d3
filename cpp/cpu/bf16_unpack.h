#pragma once

#include "cpu/byte_rows.h"
#include "cpu/unpack.h"

// Bfloat16 keys as they are, where the instruction set multiplies them. Values are multiplied by weights, which would need two
// bfloat16: as float32 they take no more instructions.
namespace quantattn::cpu::QATTN_ISA {

struct BFloat16Keys : Float32Unpack<formats::Bf16> {
  static void keys(const CodeTile& tile, int head_dim, float, Operand* operand) {
    *operand = {operand->data, Arithmetic::kBFloat16, kLanes * 4, int64_t{head_dim} * kLanes * 2};
    char* data = static_cast<char*>(operand->data);
    const int64_t vector_stride = operand->vector_stride;
    for_each_key_word(tile, head_dim / 2, [=](int vector, int word, I32 codes) __attribute__((always_inline)) {
      store_words(data + vector * vector_stride + word * kLanes * 4, codes);
    });
  }
};

template <class N = Native>
struct BFloat16Unpack : Float32Unpack<formats::Bf16> {};
template <class N>
  requires requires(typename N::Vector v) { N::add_bfloat16_products(v, v, v); }
struct BFloat16Unpack<N> : BFloat16Keys {};

template <>
struct Unpack<formats::Bf16> : BFloat16Unpack<> {};

}  // namespace quantattn::cpu::QATTN_ISA
