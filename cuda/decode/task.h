#pragma once

#include "quantattn/decode.h"

// What the host hands to a decoding kernel, and how the work is cut.
//
// Rows: the R = num_q_tokens * group_size query vectors that share one KV head; row r is query token r / group_size of head
// r % group_size of the group. Rows are cut into row tiles of the kernel's compile-time height.
// Item: one row tile of one KV head of one sequence. Items are numbered sequence first, then KV head, then row tile.
// Tile: kTileTokens keys of an item, aligned to multiples of kTileTokens; an item with no visible key still has one tile.
// Piece: the consecutive tiles of one item that one warp (or one block) has reduced to sums that are not yet normalised.
namespace quantattn::cuda {

inline constexpr int kTileTokens = 16;
inline constexpr int kWarpsPerBlock = 4;
inline constexpr int kThreadsPerBlock = 32 * kWarpsPerBlock;

// Quotient of 31-bit numbers by a run-time constant: one multiplication (Granlund & Montgomery, PLDI 1994).
struct FastDivide {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  FastDivide() = default;
  explicit FastDivide(uint32_t d) : divisor(d) {
    if (d == 1) return;
    while ((uint64_t{1} << (shift + 1)) < d) ++shift;  // shift + 1 = ceil(log2(d))
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (32 + shift)) + d - 1) / d);
  }
#if defined(__CUDACC__)
  __device__ uint32_t quotient(uint32_t n) const { return divisor == 1 ? n : __umulhi(n, multiplier) >> shift; }
#endif
};

// How the grid covers the tiles.
enum class WorkSplit : uint8_t {
  kEqualRanges,  // block i of a resident grid takes the i-th equal part of all tiles, whatever items it meets
  kFixedParts,   // a block for each part of each item; an item's parts depend on its own length alone
};

struct DecodeTask {
  DecodeParams params;
  FastDivide page_size;
  int capacity;       // tokens that a row of the page table can address
  int group_size;     // query heads per KV head
  int num_rows;         // R
  int num_row_tiles;
  int k_copy_bytes, v_copy_bytes;  // widest asynchronous copy that pointers and strides allow: 16 or 8; 0: element by element
  WorkSplit split;
  int max_parts;       // kFixedParts: blocks per item
  int min_part_tiles;  // kFixedParts: parts of an item are at least this long

  float* warp_pieces;    // [blocks, warps], pieces that a warp left before its last
  float* block_pieces;   // [blocks, 2], pieces of items that other blocks share
  uint32_t* counters;    // arrivals: at kEqualRanges one for each block, at kFixedParts one for each item
};

// Floats of a piece: accumulators [rows, head_dim], then maxima [rows], then sums [rows]; a multiple of 16 bytes.
constexpr int piece_floats(int rows, int padded_head_dim) { return (rows * (padded_head_dim + 2) + 3) / 4 * 4; }

}  // namespace quantattn::cuda
