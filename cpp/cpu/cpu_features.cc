#include "cpu/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace quantattn::cpu {

bool has_scalar() { return true; }

#if defined(__x86_64__)
namespace {

// Clang 14 knows no "f16c". Asked once: a virtual machine takes tens of microseconds to answer.
bool has_f16c() {
  static const bool answer = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  }();
  return answer;
}

}  // namespace

// The compiler's run-time support checks the operating system's register saving as well.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(__aarch64__)
bool has_neon() { return true; }
#endif

}  // namespace quantattn::cpu
