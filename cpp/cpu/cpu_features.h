#pragma once

// What this machine and its operating system can run; one function per instruction set of cmake/cpu_backend.cmake.
namespace quantattn::cpu {

bool has_scalar();
bool has_avx2();
bool has_avx512();
bool has_avx512bf16();
bool has_neon();

}  // namespace quantattn::cpu
