#include "cpu/isa_table.h"

#include <cstdlib>
#include <string>

#include "core/fail.h"

namespace quantattn::cpu {
namespace {

std::string runnable_names() {
  std::string names;
  for (const Isa& isa : isas())
    if (isa.runs_here()) names += (names.empty() ? "" : ", ") + std::string(isa.name);
  return names;
}

}  // namespace

const Isa& isa_named(std::string_view name) {
  for (const Isa& isa : isas())
    if (isa.name == name) return isa;
  fail<Unsupported>("cpu: this build has no instruction set ", name);
}

const Isa& preferred_isa() {
  const char* forced = std::getenv("QUANTATTN_CPU_ISA");
  const bool is_forced = forced != nullptr && *forced != '\0';
  for (const Isa& isa : isas())
    if (isa.runs_here() && (!is_forced || isa.name == forced)) return isa;
  fail<Unsupported>("cpu: QUANTATTN_CPU_ISA must be one of {", runnable_names(), "} on this machine and build, got ", forced);
}

}  // namespace quantattn::cpu
