#pragma once

#include <cstdint>

#include "quantattn/kv_format.h"
#include "quantattn/types.h"

// What one instruction set gives to the attention driver. Attention is a chain of stages over tiles of tokens:
//   unpack a tile of K codes -> multiply by all query rows -> softmax -> unpack the tile of V codes -> multiply by the weights.
// Only the unpacking knows the format; both products are the same small matrix product. Where few rows share a tile, a format
// multiplies its codes directly instead. A cache's K and V formats are
// therefore combined by pointers, and the number of instances is formats x instruction sets.
namespace quantattn::cpu {

inline constexpr int kTileTokens = 64;  // tokens that the stages see at once
inline constexpr int kRowBlock = 32;    // query rows between one softmax and the next
inline constexpr int kMinHeadDim = 32, kMaxHeadDim = 256, kHeadDimMultiple = 8;
inline constexpr int kWordLimit = 8191;  // largest integer of a rounded operand: with a query it still sums in int32
inline constexpr int kLineBytes = 64;
inline constexpr int kLanePadding = 16;  // vectors of 32-bit lanes in the widest instruction set

// Inlined always: a copy compiled for one instruction set must not serve the others.
QATTN_HOST_DEVICE constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// How unpacked codes are multiplied; a format may choose for every tile.
enum class Arithmetic : uint8_t {
  kFloat32,   // float32, one element in each 32-bit word
  kWords,     // int16 by int16, two products added in each word
  kBytes,     // int8 by 16 bits in two bytes, four products added in each word; direct alone
  kBFloat16,  // bfloat16, two products added in each word; as an operand for keys alone
};
inline constexpr int kNumArithmetics = 4;

// Consecutive visible tokens of one KV head: head_dim codes at row(token) for each. Rows from num_tokens to kTileTokens repeat
// the last one, so that kernels may work on whole vectors of tokens: their scores are discarded and their weights are zero.
struct CodeTile {
  int num_tokens;
  const char* const* rows;  // [kTileTokens]
  int64_t offset;
  const char* const* next_rows;  // of the tile that will be read after this one
  int64_t next_offset;

  QATTN_HOST_DEVICE const char* row(int token) const { return rows[token] + offset; }
  // While `width` bytes at `byte` of a row are read, asks for the same bytes of the next tile's row: the tiles of a head lie
  // scattered, where the hardware's prefetcher does not follow. To the second-level cache, which can wait for more lines at
  // once than the first.
  QATTN_HOST_DEVICE void prefetch(int token, int byte, int width) const {
    if (width >= kLineBytes || byte % kLineBytes == 0) __builtin_prefetch(next_rows[token] + next_offset + byte, 0, 2);
  }
};

// A tile in the layout of a matrix operand: for each step along the contracted axis (head_dim for K, tokens for V), one
// 32-bit word for each column (token for K, element of head_dim for V); columns are padded with zeros to whole vectors.
struct Operand {
  void* data = nullptr;
  Arithmetic arithmetic = Arithmetic::kFloat32;
  int64_t step_stride = 0, vector_stride = 0;  // in bytes: to the next step, to the next vector of columns
  float unit = 1.f;                            // value of a 1 in the operand
  int limit = 0;                               // largest magnitude of an integer in the operand
  bool is_finite = true;                       // of values: a weight of zero takes a token out of the product
};
inline constexpr int64_t kOperandBytes = int64_t{kTileTokens} * kMaxHeadDim * 4;

// Rows [0, num_rows) of the product with a tile; row r of the packed side starts `r` packed rows after its pointer.
struct ScoreJob {
  const void* queries;  // packed
  const Operand* keys;
  const float* key_scales;  // [kTileTokens]
  float* scores;            // [num_rows, kTileTokens]: q . k * key_scale
  int num_rows, num_tokens, head_dim;
};

struct TokenRange {
  int first, end;
};

struct SoftmaxJob {
  float* scores;              // [num_rows, kTileTokens] in; weights out, zero where nothing is visible
  const float* value_scales;  // [kTileTokens], multiply the weights; zero past num_tokens
  float* max;                 // [num_rows] running maximum
  float* sum;                 // [num_rows] running sum of exp(score - max)
  float* rescale;             // [num_rows] out: what the accumulated output must be multiplied by
  const float* offsets;       // [num_rows] added before the soft cap; null: none
  const float* slopes;        // [num_rows] ALiBi; null: none
  const float* distances;     // [num_rows] position of the tile's first key minus the query's
  const TokenRange* visible;  // [num_rows] tokens of the tile that each row sees; null: all
  float soft_cap;             // 0: none
  int num_rows, num_tokens;
};

struct AccumulateJob {
  const float* weights;  // [num_rows, kTileTokens]
  const Operand* values;
  const float* rescale;  // [num_rows]
  float* out;            // [num_rows, row_stride]: out * rescale + weights . values
  int num_rows, num_tokens, head_dim, row_stride;
  bool has_negative_weights;  // some value scale is negative
};

struct FormatStages {
  // Where the format `rounds`, keys may become multiples of a unit that is at most `coarsest_unit`, and values unless they must
  // be `exact`. What a rounded code becomes depends on the rest of the tile.
  void (*unpack_keys)(const CodeTile& tile, int head_dim, float coarsest_unit, Operand*);
  void (*unpack_values)(const CodeTile& tile, int head_dim, bool exact, Operand*);
  bool rounds;
  // Both products straight from the codes, without an operand: faster for up to `max_direct_rows` rows. Queries are packed
  // for `direct_arithmetic`; the jobs' operands are not read.
  int max_direct_rows;
  Arithmetic direct_arithmetic;
  void (*score_direct)(const CodeTile& tile, const ScoreJob&);
  void (*accumulate_direct)(const CodeTile& tile, const AccumulateJob&);
};

// Result of some keys for some query rows: not yet divided by the sum.
struct PartialResult {
  float* out;  // [rows, padded head_dim]
  float* max;  // [rows]
  float* sum;  // [rows]
};

// Parts of one sequence, `part_stride` floats apart; the joined result takes the first one's place.
struct JoinJob {
  PartialResult first;
  int64_t num_parts, part_stride, num_rows, row_stride;  // a row's stride is its padded head_dim
};

// Encoding and decoding of one vector: formats/<name>.h over `count` elements.
struct FormatCodec {
  uint16_t (*dynamic_scale)(const float* values, int count);  // as float16 bits
  void (*encode)(const float* values, float scale, int count, void* codes);
  void (*decode)(const void* codes, float scale, int count, float* values);
};

struct ArithmeticStages {
  int64_t (*query_row_bytes)(int head_dim);
  // Packs [num_rows, head_dim] queries, sm_scale included, for keys with integers up to `limit`. Null for kFloat32, which
  // takes them as they are.
  void (*pack_queries)(const float* queries, int num_rows, int head_dim, int limit, void* packed);
  // Products with operands; null for what is direct alone.
  void (*score)(const ScoreJob&);
  void (*accumulate)(const AccumulateJob&);
};

// Smallest and largest of the scales of a tile, or zero where that is smaller or larger.
struct ScaleRange {
  float smallest, largest;
};

// Conversions at the kernel's edges.
struct EdgeStages {
  void (*load)(const void* values, DType dtype, int count, float* out);
  void (*store)(const float* values, float factor, int count, DType dtype, void* out);
  // The unit of keys (scales included) at which rounding keys and queries to 16 bits moves scores by about 2^-10.
  float (*coarsest_unit)(const float* queries, int num_rows, int head_dim);
  void (*load_half_scales)(const uint16_t* halves, float factor, float* out);  // kTileTokens of them
  ScaleRange (*range_of)(const float* scales);                                 // kTileTokens of them
  float (*dot_product)(const float* a, const float* b, int count);
  void (*softmax)(const SoftmaxJob&);
  void (*join)(const JoinJob&);
};

struct IsaStages {
  EdgeStages edge;
  ArithmeticStages arithmetics[kNumArithmetics];  // by Arithmetic
};

}  // namespace quantattn::cpu
