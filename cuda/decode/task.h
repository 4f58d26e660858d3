#pragma once

#include "addresses.h"
#include "quantattn/decode.h"

// What the host hands to a decoding kernel, and how the work is cut.
//
// Rows: the R = num_q_tokens * group_size query vectors of a sequence that share one KV head; row r is query token
// r / group_size of head r % group_size of the group. Rows are cut into row tiles of the kernel's compile-time height.
// Column: one row tile of one KV head; column kv_head * num_row_tiles + row_tile of its sequence.
// Ragged batch: R and the number of row tiles are a sequence's own; one without query tokens that concern the launch has none.
// There a column has the number row_tile * num_kv_heads + kv_head.
// Item: `columns_per_block` neighbouring columns of one sequence. The warps of a block take the columns of an item side by
// side over the same keys: neighbouring heads lie next to each other in memory, and DRAM likes to be read that way.
// Tile: kTileTokens keys of an item, aligned to multiples of kTileTokens; an item with no visible key still has one tile.
// Unit: what a block takes at a time: its equal range, or a part of an item.
// Piece: the consecutive tiles of one column that one warp (or one block) has reduced to sums that are not yet normalised.
namespace quantattn::cuda {

inline constexpr int kTileTokens = 16;
inline constexpr int kMaxWarpsPerBlock = 16;

// Quotient of 31-bit numbers by a run-time constant: one multiplication (Granlund & Montgomery, PLDI 1994).
struct FastDivide {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  FastDivide() = default;
  explicit FastDivide(uint32_t d) : divisor(d) {
    if (d <= 1) return;
    while ((uint64_t{1} << (shift + 1)) < d) ++shift;  // shift + 1 = ceil(log2(d))
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (32 + shift)) + d - 1) / d);
  }
#if defined(__CUDACC__)
  __device__ uint32_t quotient(uint32_t n) const { return divisor == 1 ? n : __umulhi(n, multiplier) >> shift; }
#endif
};

// How the grid covers the tiles.
enum class WorkSplit : uint8_t {
  kEqualRanges,  // block i of a resident grid takes the i-th equal part of all tiles, whatever items it meets; where all
                 // sequences are equally long, fewer blocks may do, if each then has whole items or parts of one
  kFixedParts,   // a block for each part of each item; an item's parts depend on its own length alone
  kDealtParts,   // the same parts of a ragged batch, whose number the device alone knows: a resident grid takes them in turn
};

struct DecodeTask {
  DecodeParams params;                    // of a ragged batch: num_q_tokens is 0, and q and out have no outer stride
  Strided1D<const int32_t> cu_seqlens_q;  // [B + 1] of a ragged batch
  int total_tokens;                       // of a ragged batch: T
  int fewest_tokens, most_tokens;         // a ragged batch's sequences with fewer or more query tokens are left alone
  bool causal;
  CodeAddresses k, v;
  FastDivide page_size;
  int capacity;                   // tokens that a row of the page table can address
  FastDivide group_size;          // query heads per KV head
  int num_rows;                   // R; of a ragged batch: what every sequence must have for the cut of equal lengths
  FastDivide columns_divisor;     // row tiles of a sequence; of a ragged batch: KV heads
  int rows_log2;                  // of a row tile
  int columns_log2;               // of columns_per_block
  int warps_per_column;           // warps of a block / columns_per_block
  FastDivide items_per_sequence;  // of a ragged batch: for each row tile
  bool is_tile_in_page;           // no tile crosses the end of a page
  bool can_store_quads;           // output rows at multiples of four elements
  bool can_copy_query;            // 16-bit elements, rows at multiples of 16 bytes
  bool has_token_scales;          // K or V has a scale for each token
  WorkSplit split;
  unsigned even_units;        // kEqualRanges: blocks that share sequences of num_rows rows and equal length; 0: as others
  FastDivide max_parts;       // parts per item; at kEqualRanges of equally long sequences: by 0: a block has whole items
  FastDivide min_part_tiles;  // parts of an item are at least this long
  unsigned max_units;         // kDealtParts: parts that the workspace has room for
  bool starts_early;    // the kernel before this one called overlap_launches() and writes nothing that is read or written here
  bool has_item_spans;  // kDealtParts: an item reads the keys that its own rows see, not all that the sequence's do

  float* warp_pieces;  // [blocks, warps, 2], pieces that a warp leaves before its last, and scratch
  float* unit_pieces;  // [units, pieces_per_unit, columns_per_block], pieces of items that other units share
  int pieces_per_unit;
  uint32_t* counters;  // arrivals: one for each unit; an item's is that of its first unit
};

// The task of a kernel that knows when it is compiled whether its batches are ragged. Most are not: knowing that saves
// microseconds.
template <bool kIsRagged>
struct BatchTask : DecodeTask {
  BatchTask() = default;
  explicit BatchTask(const DecodeTask& task) : DecodeTask(task) {}
#if defined(__CUDACC__)
  __device__ static constexpr bool is_ragged() { return kIsRagged; }
  __device__ bool is_causal() const { return !kIsRagged || causal; }
  __device__ bool is_dealt() const { return kIsRagged && split == WorkSplit::kDealtParts; }
  __device__ bool is_fixed() const { return kIsRagged ? split == WorkSplit::kFixedParts : split != WorkSplit::kEqualRanges; }
  __device__ bool has_even_cut() const { return even_units > 0; }
  __device__ bool may_start_early() const { return kIsRagged && starts_early; }
#endif
};
using UniformTask = BatchTask<false>;
using RaggedTask = BatchTask<true>;

// Floats of a piece: accumulators [rows, head_dim], then maxima [rows], then sums [rows]; a multiple of 16 bytes.
constexpr int piece_floats(int rows, int padded_head_dim) { return (rows * (padded_head_dim + 2) + 3) / 4 * 4; }

}  // namespace quantattn::cuda
