#include "cpu/cpu_features.h"

namespace quantattn::cpu {

bool has_scalar() { return true; }

#if defined(__x86_64__)
// The compiler's run-time support checks the operating system's register saving as well.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi");
}
#elif defined(__aarch64__)
bool has_neon() { return true; }
#endif

}  // namespace quantattn::cpu
