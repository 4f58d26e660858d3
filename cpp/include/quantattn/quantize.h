#pragma once

#include "quantattn/kv_cache.h"

namespace quantattn {

// Dynamic scales, the same on every backend: amax = largest finite |x| of the vector, scale = amax / max_code rounded up to
// float16 (at most 65504), code = encode(x / scale) in float32 arithmetic; a zero scale gives zero codes. With an offset, x is
// the value minus the offset of its channel in float32, and decoding adds it again.

// Shapes: N, P, H, D as in KvCacheView; one page (N = 1) where the caller has a flat list of tokens.
struct CodecParams {
  KvFormat format = KvFormat::kFp16;
  VectorArray values;             // [N, P, H, D], value_dtype: read by quantize_kv, written by dequantize_kv
  VectorArray codes;              // [N, P, H, D], element type of the format
  ScaleView scale;                // kTokenHead is written by quantize_kv; other granularities are read
  Strided2D<const float> offset;  // [H, D], D contiguous, finite; not given: zero
  DType value_dtype = DType::kFloat32;
  int64_t num_pages = 0;
  int64_t page_size = 0;
  int num_heads = 0, head_dim = 0;
};

QATTN_API void quantize_kv(const CodecParams& params, const Execution& execution);
QATTN_API void dequantize_kv(const CodecParams& params, const Execution& execution);

// Encodes T new rows of K and V and writes codes and scales into cache slots, in one launch.
struct AppendParams {
  VectorArray k, v;  // [1, T, H, D], dtype
  DType dtype = DType::kFloat32;
  int64_t num_tokens = 0;                 // T
  Strided1D<const int64_t> slot_mapping;  // [T] page * page_size + offset; -1: skip the row; others distinct
  KvCacheView cache;
};

// On a CPU every slot is checked before the first write, so a bad one changes nothing; a repeated slot keeps the last row.
// On CUDA a slot outside the cache is skipped.
QATTN_API void append_kv(const AppendParams& params, const Execution& execution);

}  // namespace quantattn
