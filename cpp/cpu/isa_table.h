#pragma once

#include <iterator>
#include <span>
#include <string_view>

#include "cpu/stages.h"

namespace quantattn::cpu {

inline constexpr int kNumFormats = static_cast<int>(std::size(kKvFormats));

// One instruction set of this build.
struct Isa {
  std::string_view name;
  bool (*runs_here)();
  const IsaStages* stages;
  const FormatStages* formats[kNumFormats];  // by KvFormat
  const FormatCodec* codecs[kNumFormats];
};

// Most capable first.
std::span<const Isa> isas();

// The instruction set called `name`, which this build has.
const Isa& isa_named(std::string_view name);

// The one that the environment variable QUANTATTN_CPU_ISA forces, or the most capable that runs here. Throws Unsupported
// where the variable names none that can run.
const Isa& preferred_isa();

}  // namespace quantattn::cpu
