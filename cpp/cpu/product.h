#pragma once

#include "cpu/simd.h"
#include "cpu/stages.h"

// The matrix product of both stages: C[row][column] = sum over steps of A[row][step] * B[step][column], with the query
// rows that share a KV head and one tile of columns. A's 32-bit words are broadcast, B's columns are lanes.
//
// A Product says how one word is multiplied:
//   Sum                 accumulator of one vector of columns
//   add(sum, a, b)      adds the product of the word at `a` and the vector at `b`
namespace quantattn::cpu::QATTN_ISA {

// Sums of a block stay in registers: 6 x 2 vectors in the 16 of AVX2, 4 x 4 elsewhere.
inline constexpr int kBlockRows = kLanes == 8 ? 6 : 4;
inline constexpr int kBlockVectors = kLanes == 8 ? 2 : 4;

// A block of kRows x kVectors sums held in registers. Calls `flush(row, vector, sum)` for each.
template <int kRows, int kVectors, class Product, class Flush>
QATTN_INLINE void product_block(const Product& product, const char* a, int64_t a_row_stride, const char* b,
                                const Operand& operand, int num_steps, const Flush& flush) {
  typename Product::Sum sums[kRows][kVectors] = {};
  for (int step = 0; step < num_steps; ++step) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        product.add(sums[r][v], a + r * a_row_stride + step * 4, b + step * operand.step_stride + v * operand.vector_stride);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) flush(r, v, sums[r][v]);
}

template <int kRows, class Product, class Flush>
QATTN_INLINE void product_rows(const Product& product, const char* a, int64_t a_row_stride, int first_row,
                               const Operand& operand, int num_vectors, int num_steps, const Flush& flush) {
  constexpr int kVectors = kRows > 2 ? kBlockVectors : 4;
  const char* b = static_cast<const char*>(operand.data);
  a += first_row * a_row_stride;
  int vector = 0;
  for (; vector + kVectors <= num_vectors; vector += kVectors)
    product_block<kRows, kVectors>(product, a, a_row_stride, b + vector * operand.vector_stride, operand, num_steps,
                                   [&](int r, int v, const typename Product::Sum& sum)
                                       __attribute__((always_inline)) { flush(first_row + r, vector + v, sum); });
  for (; vector < num_vectors; ++vector)
    product_block<kRows, 1>(product, a, a_row_stride, b + vector * operand.vector_stride, operand, num_steps,
                            [&](int r, int, const typename Product::Sum& sum)
                                __attribute__((always_inline)) { flush(first_row + r, vector, sum); });
}

// All rows, `a_row_stride` bytes apart.
template <class Product, class Flush>
QATTN_INLINE void multiply(const Product& product, const void* a_words, int64_t a_row_stride, int num_rows,
                           const Operand& operand, int num_vectors, int num_steps, const Flush& flush) {
  const char* a = static_cast<const char*>(a_words);
  int row = 0;
  for (; row + kBlockRows <= num_rows; row += kBlockRows)
    product_rows<kBlockRows>(product, a, a_row_stride, row, operand, num_vectors, num_steps, flush);
  for (; row + 2 <= num_rows; row += 2) product_rows<2>(product, a, a_row_stride, row, operand, num_vectors, num_steps, flush);
  if (row < num_rows) product_rows<1>(product, a, a_row_stride, row, operand, num_vectors, num_steps, flush);
}

}  // namespace quantattn::cpu::QATTN_ISA
