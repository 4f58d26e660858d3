#pragma once

#include "quantattn/kv_format.h"
#include "quantattn/types.h"

namespace quantattn {

// What one scale covers. The dequantised element is code * scale, plus the offset of its channel where keys have one.
enum class ScaleGranularity : uint8_t {
  kNone,       // no scale: the code is the number
  kTensor,     // one float32
  kHead,       // float32 [num_kv_heads]
  kTokenHead,  // float16, one per vector: [num_pages, page_size, num_kv_heads] in the strides below
};

struct ScaleView {
  ScaleGranularity granularity = ScaleGranularity::kNone;
  void* data = nullptr;
  int64_t page_stride = 0, token_stride = 0, head_stride = 0;  // in elements; zero where the granularity has no such axis

  QATTN_HOST_DEVICE int64_t offset(int64_t page, int64_t token, int64_t head) const {
    return page * page_stride + token * token_stride + head * head_stride;
  }
};

// A cache is `num_pages` pages of `page_size` tokens; a contiguous cache has one page per sequence.
// Shapes: N = num_pages, P = page_size, H = num_kv_heads, D = head_dim.
struct KvCacheView {
  KvPair format;
  VectorArray k_codes, v_codes;  // [N, P, H, D], element type of the format; D contiguous, other strides free
  ScaleView k_scale, v_scale;
  // [H, D], D contiguous, finite: subtracted from keys before they are encoded. Attention counts it back in exactly, since it
  // adds one number, sm_scale * q . k_offset, to all scores of a query. Not given: zero.
  Strided2D<const float> k_offset;
  int64_t num_pages = 0;
  int page_size = 0, num_kv_heads = 0, head_dim = 0;
};

// Checks sizes, pointers, alignment and scales once, so that calls over the cache need not. Throws InvalidArgument.
QATTN_API void validate(const KvCacheView& cache, std::string_view who);

}  // namespace quantattn
