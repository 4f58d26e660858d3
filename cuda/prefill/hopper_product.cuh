#pragma once

#include "prefill/hopper_ptx.cuh"
#include "prefill/hopper_task.h"

// Matrix products of a warpgroup (wgmma, sm_90a): sums[64 x N] += a[64 x 16] * b[16 x N], float32 sums in registers, b in
// shared memory, a in shared memory or registers. Thread t of the warpgroup holds, for each 8 columns i, the sums
// 4 i .. 4 i + 3: columns 2 (t % 4), 2 (t % 4) + 1 of row 16 (t / 32) + t % 32 / 4, then of the row 8 below.
//
// Operands are made of atoms of eight rows by 64 columns: rows of 128 bytes, of which the 16-byte chunk c of row r is stored as
// chunk c ^ (r % 8), the order of CU_TENSOR_MAP_SWIZZLE_128B. Atoms begin at multiples of 1024 bytes.
namespace quantattn::cuda {

inline constexpr int kBlockColumns = 64, kBlockRowBytes = 128;

// An operand of kRows rows, one block of 64 columns after the other.
template <int kRows>
inline constexpr AtomStrides kBlockAfterBlock = {kRows * kBlockRowBytes / 16, 8 * kBlockRowBytes / 16};

// Where chunk `chunk` of a row lies in an operand.
__device__ __forceinline__ constexpr int operand_offset(AtomStrides strides, int row, int chunk) {
  return static_cast<int>(static_cast<uint32_t>(chunk / 8) * strides.block + static_cast<uint32_t>(row / 8) * strides.group) *
             16 +
         row % 8 * kBlockRowBytes + ((chunk % 8) ^ (row % 8)) * 16;
}
template <int kRows>
__device__ __forceinline__ constexpr int operand_offset(int row, int chunk) {
  return operand_offset(kBlockAfterBlock<kRows>, row, chunk);
}

// The description of an operand at a shared address. The distance of blocks is read where they count as columns of b (the
// values), not where they count as the inner dimension (queries and keys).
__device__ __forceinline__ uint64_t describe_operand(uint32_t address_part, AtomStrides strides) {
  constexpr uint32_t kSwizzle128 = 1u << 30;
  return static_cast<uint64_t>(strides.group | kSwizzle128) << 32 | (address_part + (strides.block << 16));
}
__device__ __forceinline__ uint32_t address_part(uint32_t address) { return (address & 0x3FFFFu) >> 4; }

// Before the first product that reads registers which ordinary instructions wrote.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of registers that products write or read across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

#define QATTN_SUMS_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define QATTN_SUMS_32(d, i) QATTN_SUMS_8(d, i), QATTN_SUMS_8(d, i + 8), QATTN_SUMS_8(d, i + 16), QATTN_SUMS_8(d, i + 24)
#define QATTN_SUMS_64(d, i) QATTN_SUMS_32(d, i), QATTN_SUMS_32(d, i + 32)
#define QATTN_SUMS_128(d, i) QATTN_SUMS_64(d, i), QATTN_SUMS_64(d, i + 64)

#define QATTN_NAMES_32                                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define QATTN_NAMES_64                                                                                               \
  QATTN_NAMES_32                                                                                                     \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QATTN_NAMES_128                                                                                                \
  QATTN_NAMES_64                                                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "   \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, "   \
  "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"

template <int kColumns, bool kIsBf16>
struct WarpgroupProduct;

// `keys`: a and b from shared memory, both with the inner dimension contiguous. `values`: a from registers, b with its columns
// contiguous. Arguments of the macro: N, number of sums, element type, is_bf16, then the numbers of the operands after the
// sums.
#define QATTN_WARPGROUP_PRODUCT(N, COUNT, TYPE, IS_BF16, I0, I1, I2, I3, I4, I5)                                             \
  template <>                                                                                                                \
  struct WarpgroupProduct<N, IS_BF16> {                                                                                      \
    __device__ __forceinline__ static void keys(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate) {                 \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #I2 ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE  \
                   "." TYPE " {" QATTN_NAMES_##COUNT "}, %" #I0 ", %" #I1 ", p, 1, 1, 0, 0;\n}"                              \
                   : QATTN_SUMS_##COUNT(d, 0)                                                                                \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                       \
    }                                                                                                                        \
    __device__ __forceinline__ static void values(float (&d)[COUNT], const uint32_t* a, uint64_t b) {                        \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #I5 ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE  \
                   "." TYPE " {" QATTN_NAMES_##COUNT "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1, 1;\n}" \
                   : QATTN_SUMS_##COUNT(d, 0)                                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                                            \
    }                                                                                                                        \
  };

QATTN_WARPGROUP_PRODUCT(64, 32, "f16", false, 32, 33, 34, 35, 36, 37)
QATTN_WARPGROUP_PRODUCT(64, 32, "bf16", true, 32, 33, 34, 35, 36, 37)
QATTN_WARPGROUP_PRODUCT(128, 64, "f16", false, 64, 65, 66, 67, 68, 69)
QATTN_WARPGROUP_PRODUCT(128, 64, "bf16", true, 64, 65, 66, 67, 68, 69)
QATTN_WARPGROUP_PRODUCT(256, 128, "f16", false, 128, 129, 130, 131, 132, 133)
QATTN_WARPGROUP_PRODUCT(256, 128, "bf16", true, 128, 129, 130, 131, 132, 133)

#undef QATTN_WARPGROUP_PRODUCT

}  // namespace quantattn::cuda
