#pragma once

#include "cpu/word_table_unpack.h"

namespace quantattn::cpu::QATTN_ISA {

template <>
struct Unpack<formats::Fp8E5M2> : FloatByteUnpack<formats::Fp8E5M2> {};

}  // namespace quantattn::cpu::QATTN_ISA
