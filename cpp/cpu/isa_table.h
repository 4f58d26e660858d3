#pragma once

#include <iterator>
#include <span>
#include <string_view>

#include "cpu/stages.h"

namespace quantattn::cpu {

inline constexpr int kNumFormats = static_cast<int>(std::size(kKvFormats));
// Fresh keys and values may be float32, which no cache stores.
inline constexpr int kFloat32Stages = kNumFormats;

// One instruction set of this build.
struct Isa {
  std::string_view name;
  bool (*runs_here)();
  const IsaStages* stages;
  const FormatStages* formats[kNumFormats + 1];  // by KvFormat, then kFloat32Stages
  const FormatCodec* codecs[kNumFormats];
};

// The row of Isa::formats for keys and values that are stored as `dtype`.
constexpr int stages_of(DType dtype) {
  return dtype == DType::kFloat32 ? kFloat32Stages
                                  : static_cast<int>(dtype == DType::kFloat16 ? KvFormat::kFp16 : KvFormat::kBf16);
}

// Most capable first.
std::span<const Isa> isas();

// The instruction set called `name`, which this build has.
const Isa& isa_named(std::string_view name);

// The one that the environment variable QUANTATTN_CPU_ISA forces, or the most capable that runs here. Throws Unsupported
// where the variable names none that can run.
const Isa& preferred_isa();

}  // namespace quantattn::cpu
