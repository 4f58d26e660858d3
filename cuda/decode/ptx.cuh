#pragma once

#include <cstdint>

// The few PTX instructions that CUDA C++ does not offer, one function each. All exist from sm_80 on.
namespace quantattn::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// threadIdx.x, read anew: kept, it would take a register from every tile.
__device__ __forceinline__ int thread_index() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread & 1023;  // so that the compiler knows its range
}
__device__ __forceinline__ int warp_index() { return thread_index() / 32; }

// The calling thread's lane, held in a register: read anew wherever it is used, as the assembler likes to, it is slow.
__device__ __forceinline__ int lane_index() { return __shfl_sync(0xFFFFFFFFu, thread_index() % 32, thread_index()) & 31; }

// Copies kBytes (4, 8 or 16) from global to shared memory; where `is_live` is false it reads nothing and writes zeros.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t destination, const void* source, bool is_live) {
  const int read_bytes = is_live ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(read_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(kBytes), "r"(read_bytes)
                 : "memory");
}

// x = *from where `is_wanted`. Unlike after a branch round a load, nothing waits for x before it is used.
__device__ __forceinline__ void load_if(bool is_wanted, const int32_t* from, int& x) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.s32 %0, [%1];}"
               : "+r"(x)
               : "l"(from), "r"(static_cast<int>(is_wanted)));
}
__device__ __forceinline__ void load_if(bool is_wanted, const uint16_t* from, uint16_t& x) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.b16 %0, [%1];}"
               : "+h"(x)
               : "l"(from), "r"(static_cast<int>(is_wanted)));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements across the warp.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t fragment) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(fragment));
  return transposed;
}

// c[16 x 8] += a[16 x 16] * b[16 x 8], float32 accumulation.
__device__ __forceinline__ void multiply_float16(float (&c)[4], const uint32_t (&a)[4], uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

__device__ __forceinline__ void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// Adds, after all writes of this thread and of those it has met at a barrier, and before all that they read later.
__device__ __forceinline__ uint32_t add_ordered(uint32_t* counter, uint32_t x) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(x) : "memory");
  return before;
}

// 2^x with a relative error of 2^-22; results below 2^-126 become zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Waits until the kernels before this one have finished and their writes are visible. Nothing that they write may be touched
// earlier.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream take its place on free multiprocessors, once every block has come here or has ended.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// In this order a kernel that does not wait for this one finds all before this one finished. Where the next one waits, the
// other order lets it take its place earlier.
__device__ __forceinline__ void overlap_launches() {
  wait_for_previous();
  let_next_start();
}

// The first operand becomes the low half.
__device__ __forceinline__ uint32_t pack_float16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

}  // namespace quantattn::cuda
