#pragma once

#include "cpu/bfloat16_direct.h"
#include "cpu/word_table_unpack.h"

namespace quantattn::cpu::QATTN_ISA {

template <>
struct Unpack<formats::Fp8E4M3> : FloatByteUnpack<formats::Fp8E4M3> {};
template <>
struct Direct<formats::Fp8E4M3> : FloatByteDirect<formats::Fp8E4M3> {};

}  // namespace quantattn::cpu::QATTN_ISA
