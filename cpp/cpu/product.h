#pragma once

#include "cpu/simd.h"
#include "cpu/stages.h"

// The matrix product of both stages: C[row][column] = sum over steps of A[row][step] * B[step][column], with a few rows (the
// query heads that share a KV head) and one tile of columns. A's words are broadcast, B's columns are lanes.
namespace quantattn::cpu::QATTN_ISA {

struct Float32Product {
  using Sum = F32;
  using Word = float;
  QATTN_INLINE Sum zero() { return F32{}; }
  QATTN_INLINE void add(Sum& sum, Word a, const char* b) { sum += a * load(reinterpret_cast<const float*>(b)); }
  QATTN_INLINE F32 finish(Sum sum) { return sum; }
};

// A block of kRows x kVectors sums held in registers. Calls `flush(row, vector, value)` for each.
template <class Product, int kRows, int kVectors, class Flush>
QATTN_INLINE void product_block(const typename Product::Word* a, int64_t a_row_stride, const char* b, int64_t step_stride,
                                int64_t vector_stride, int num_steps, const Flush& flush) {
  typename Product::Sum sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Product::zero();
  for (int step = 0; step < num_steps; ++step) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        Product::add(sums[r][v], a[r * a_row_stride + step], b + step * step_stride + v * vector_stride);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) flush(r, v, Product::finish(sums[r][v]));
}

template <class Product, int kRows, class Flush>
QATTN_INLINE void product_rows(const typename Product::Word* a, int64_t a_row_stride, const Operand& b, int num_vectors,
                               int num_steps, int first_row, const Flush& flush) {
  constexpr int kVectors = 4;
  const char* data = static_cast<const char*>(b.data);
  int vector = 0;
  for (; vector + kVectors <= num_vectors; vector += kVectors)
    product_block<Product, kRows, kVectors>(
        a + first_row * a_row_stride, a_row_stride, data + vector * b.vector_stride, b.step_stride, b.vector_stride, num_steps,
        [&](int r, int v, F32 value) __attribute__((always_inline)) { flush(first_row + r, vector + v, value); });
  for (; vector < num_vectors; ++vector)
    product_block<Product, kRows, 1>(
        a + first_row * a_row_stride, a_row_stride, data + vector * b.vector_stride, b.step_stride, b.vector_stride, num_steps,
        [&](int r, int, F32 value) __attribute__((always_inline)) { flush(first_row + r, vector, value); });
}

// All rows; the widest register block that divides what is left.
template <class Product, class Flush>
QATTN_INLINE void product(const typename Product::Word* a, int64_t a_row_stride, int num_rows, const Operand& b,
                          int num_vectors, int num_steps, const Flush& flush) {
  int row = 0;
  for (; row + 4 <= num_rows; row += 4) product_rows<Product, 4>(a, a_row_stride, b, num_vectors, num_steps, row, flush);
  if (row + 2 <= num_rows) {
    product_rows<Product, 2>(a, a_row_stride, b, num_vectors, num_steps, row, flush);
    row += 2;
  }
  if (row < num_rows) product_rows<Product, 1>(a, a_row_stride, b, num_vectors, num_steps, row, flush);
}

}  // namespace quantattn::cpu::QATTN_ISA
