#include "cpu/codec.h"

#include <algorithm>

#include "cpu/isa_table.h"
#include "cpu/thread_pool.h"
#include "formats/scale.h"

namespace quantattn::cpu {
namespace {

constexpr int kBlock = 1024;                  // elements converted at once; a longer vector is encoded in blocks
constexpr int64_t kItemTokens = 64;           // tokens of one work item
constexpr int64_t kSerialElements = 1 << 14;  // below this, waking a thread costs more than it saves

// One vector's codes, scale and offset.
struct VectorLocation {
  char* codes;
  void* scale;          // null: none
  const float* offset;  // null: none
};

// Where a tensor's codes are and what they mean.
struct Encoding {
  const VectorArray& codes;
  const ScaleView& scale;
  Strided2D<const float> offset;
};

class Codec {
 public:
  Codec(KvFormat format, ScaleGranularity granularity, DType dtype, int head_dim)
      : codec_(*preferred_isa().codecs[static_cast<int>(format)]),
        edge_(preferred_isa().stages->edge),
        granularity_(granularity),
        dtype_(dtype),
        head_dim_(head_dim),
        code_bytes_(code_bytes(format)) {}

  void encode(const void* values, VectorLocation at) const {
    float buffer[kBlock];
    if (granularity_ == ScaleGranularity::kTokenHead) write_dynamic_scale(values, at);
    const float scale = scale_of(at);
    for (int first = 0; first < head_dim_; first += kBlock) {
      const int count = std::min(kBlock, head_dim_ - first);
      load(values, at.offset, first, count, buffer);
      codec_.encode(buffer, scale, count, at.codes + int64_t{first} * code_bytes_);
    }
  }

  void decode(VectorLocation at, void* values) const {
    float buffer[kBlock];
    const float scale = scale_of(at);
    for (int first = 0; first < head_dim_; first += kBlock) {
      const int count = std::min(kBlock, head_dim_ - first);
      codec_.decode(at.codes + int64_t{first} * code_bytes_, scale, count, buffer);
      for (int i = 0; at.offset && i < count; ++i) buffer[i] += at.offset[first + i];
      edge_.store(buffer, 1.f, count, dtype_, static_cast<char*>(values) + int64_t{first} * bytes_of(dtype_));
    }
  }

  VectorLocation locate(const Encoding& encoding, int64_t page, int64_t token, int64_t head) const {
    const auto& [codes, scale, offset] = encoding;
    char* data = static_cast<char*>(codes.data) + codes.offset(page, token, head) * code_bytes_;
    const float* offsets = offset ? &offset.at(head, 0) : nullptr;
    if (granularity_ == ScaleGranularity::kNone) return {data, nullptr, offsets};
    const int64_t scale_bytes = granularity_ == ScaleGranularity::kTokenHead ? 2 : 4;
    return {data, static_cast<char*>(scale.data) + scale.offset(page, token, head) * scale_bytes, offsets};
  }

 private:
  // Elements [first, first + count) of a vector, without their offsets.
  void load(const void* values, const float* offset, int first, int count, float* buffer) const {
    edge_.load(static_cast<const char*>(values) + int64_t{first} * bytes_of(dtype_), dtype_, count, buffer);
    for (int i = 0; offset && i < count; ++i) buffer[i] = formats::without_offset(buffer[i], offset[first + i]);
  }

  float scale_of(VectorLocation at) const {
    if (granularity_ == ScaleGranularity::kNone) return 1.f;
    if (granularity_ == ScaleGranularity::kTokenHead) return formats::float_of_half(*static_cast<const uint16_t*>(at.scale));
    return *static_cast<const float*>(at.scale);
  }

  // The scale is monotonic in the largest magnitude, so a vector's scale is the largest of its blocks'.
  void write_dynamic_scale(const void* values, VectorLocation at) const {
    float buffer[kBlock];
    uint16_t scale = 0;
    for (int first = 0; first < head_dim_; first += kBlock) {
      const int count = std::min(kBlock, head_dim_ - first);
      load(values, at.offset, first, count, buffer);
      scale = std::max(scale, codec_.dynamic_scale(buffer, count));
    }
    *static_cast<uint16_t*>(at.scale) = scale;
  }

  const FormatCodec& codec_;
  const EdgeStages& edge_;
  ScaleGranularity granularity_;
  DType dtype_;
  int head_dim_, code_bytes_;
};

int num_threads_for(int64_t num_elements, const Execution& execution) {
  const int num_threads = resolve_num_threads(execution);
  return num_elements < kSerialElements ? 1 : num_threads;
}

// Calls body(page, token, head) for every vector of [num_pages, page_size, num_heads].
template <class Body>
void for_each_vector(const CodecParams& p, const Execution& execution, const Body& body) {
  const int64_t num_tokens = p.num_pages * p.page_size, num_items = (num_tokens + kItemTokens - 1) / kItemTokens;
  parallel_for(num_threads_for(num_tokens * p.num_heads * p.head_dim, execution), num_items, [&](int64_t item, int) {
    const int64_t end = std::min(num_tokens, (item + 1) * kItemTokens);
    for (int64_t t = item * kItemTokens; t < end; ++t)
      for (int64_t head = 0; head < p.num_heads; ++head) body(t / p.page_size, t % p.page_size, head);
  });
}

// The row that ends up in each slot is the last one given for it, so rows of one slot run in order on one thread.
bool has_repeated_slots(const AppendParams& p) {
  for (int64_t t = 1; t < p.num_tokens; ++t)
    if (p.slot_mapping[t] != -1 && p.slot_mapping[t] <= p.slot_mapping[t - 1]) return true;
  return false;
}

}  // namespace

void quantize(const CodecParams& p, const Execution& execution) {
  const Codec codec(p.format, p.scale.granularity, p.value_dtype, p.head_dim);
  for_each_vector(p, execution, [&](int64_t page, int64_t token, int64_t head) {
    const char* values = static_cast<const char*>(p.values.data) + p.values.offset(page, token, head) * bytes_of(p.value_dtype);
    codec.encode(values, codec.locate({p.codes, p.scale, p.offset}, page, token, head));
  });
}

void dequantize(const CodecParams& p, const Execution& execution) {
  const Codec codec(p.format, p.scale.granularity, p.value_dtype, p.head_dim);
  for_each_vector(p, execution, [&](int64_t page, int64_t token, int64_t head) {
    char* values = static_cast<char*>(p.values.data) + p.values.offset(page, token, head) * bytes_of(p.value_dtype);
    codec.decode(codec.locate({p.codes, p.scale, p.offset}, page, token, head), values);
  });
}

void append(const AppendParams& p, const Execution& execution) {
  const KvCacheView& cache = p.cache;
  const Codec k_codec(cache.format.k, cache.k_scale.granularity, p.dtype, cache.head_dim);
  const Codec v_codec(cache.format.v, cache.v_scale.granularity, p.dtype, cache.head_dim);
  const int64_t num_elements = p.num_tokens * cache.num_kv_heads * cache.head_dim;
  const int num_threads = has_repeated_slots(p) ? 1 : num_threads_for(num_elements, execution);
  const int64_t num_items = (p.num_tokens + kItemTokens - 1) / kItemTokens;
  parallel_for(num_threads, num_items, [&](int64_t item, int) {
    const int64_t end = std::min(p.num_tokens, (item + 1) * kItemTokens);
    for (int64_t t = item * kItemTokens; t < end; ++t) {
      const int64_t slot = p.slot_mapping[t];
      if (slot < 0) continue;
      const int64_t page = slot / cache.page_size, token = slot % cache.page_size;
      for (int64_t head = 0; head < cache.num_kv_heads; ++head) {
        const int64_t bytes = bytes_of(p.dtype);
        k_codec.encode(static_cast<const char*>(p.k.data) + p.k.offset(0, t, head) * bytes,
                       k_codec.locate({cache.k_codes, cache.k_scale, cache.k_offset}, page, token, head));
        v_codec.encode(static_cast<const char*>(p.v.data) + p.v.offset(0, t, head) * bytes,
                       v_codec.locate({cache.v_codes, cache.v_scale, {}}, page, token, head));
      }
    }
  });
}

}  // namespace quantattn::cpu
