#include "reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace quantattn_test {
namespace {

using namespace quantattn;

// sign, exponent and mantissa of a small float; the highest exponent means infinity and NaN unless `is_fn`.
double decode_float(uint32_t bits, int exponent_bits, int mantissa_bits, bool is_fn) {
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & top;
  const int mantissa = static_cast<int>(bits & ((1u << mantissa_bits) - 1));
  const double sign = bits >> (exponent_bits + mantissa_bits) & 1u ? -1.0 : 1.0;
  const bool is_all_ones = exponent == top && mantissa == (1 << mantissa_bits) - 1;
  if (is_fn ? is_all_ones : exponent == top && mantissa != 0) return std::numeric_limits<double>::quiet_NaN();
  if (!is_fn && exponent == top) return sign * std::numeric_limits<double>::infinity();
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1.0 + fraction, exponent - bias));
}

double scale_at(const ScaleView& scale, int64_t page, int64_t token, int64_t head) {
  const int64_t offset = scale.offset(page, token, head);
  switch (scale.granularity) {
    case ScaleGranularity::kNone:
      return 1.0;
    case ScaleGranularity::kTokenHead:
      return decode_half(static_cast<const uint16_t*>(scale.data)[offset]);
    default:
      return static_cast<const float*>(scale.data)[offset];
  }
}

// Keys and values of one KV head of a sequence: [length, head_dim].
struct HeadKeys {
  std::vector<double> k, v;
  int64_t length;
};

// `element(array index, token, d)`: 0 is K, 1 is V.
template <class ElementOf>
HeadKeys decode_keys(int64_t length, int64_t head_dim, const ElementOf& element) {
  HeadKeys keys{{}, {}, length};
  for (int64_t j = 0; j < length; ++j)
    for (int64_t d = 0; d < head_dim; ++d) {
      keys.k.push_back(element(0, j, d));
      keys.v.push_back(element(1, j, d));
    }
  return keys;
}

// One query row and all that decides its result. It stands at `position` and sees some of the keys from `start` on.
struct QueryRow {
  std::vector<double> q;
  int64_t position, start;
  bool causal;
  double sm_scale, soft_cap, slope;
  int window;
  bool has_sink;
  double sink;
};

double score(const QueryRow& row, const HeadKeys& keys, int64_t j) {
  const size_t head_dim = row.q.size();
  const double* key = &keys.k[static_cast<size_t>(j) * head_dim];
  double s = 0;
  for (size_t d = 0; d < head_dim; ++d) s += row.q[d] * key[d];
  s *= row.sm_scale;
  if (row.soft_cap > 0) s = row.soft_cap * std::tanh(s / row.soft_cap);
  return s + row.slope * static_cast<double>(j - row.position);
}

void attend(const QueryRow& row, const HeadKeys& keys, double* out, double* lse) {
  const size_t head_dim = row.q.size();
  std::vector<int64_t> seen;
  std::vector<double> scores;
  for (int64_t j = row.start; j < keys.length; ++j) {
    if ((row.causal && j > row.position) || (row.window > 0 && row.position - j >= row.window)) continue;
    seen.push_back(j);
    scores.push_back(score(row, keys, j));
  }
  double largest = row.has_sink ? row.sink : -std::numeric_limits<double>::infinity();
  for (double s : scores) largest = std::max(largest, s);
  double sum = row.has_sink ? std::exp(row.sink - largest) : 0;
  for (double s : scores) sum += std::exp(s - largest);
  *lse = seen.empty() && !row.has_sink ? largest : largest + std::log(sum);
  std::fill(out, out + head_dim, 0.0);
  for (size_t k = 0; k < seen.size(); ++k) {
    const double weight = std::exp(scores[k] - *lse);
    for (size_t d = 0; d < head_dim; ++d) out[d] += weight * keys.v[static_cast<size_t>(seen[k]) * head_dim + d];
  }
}

// A row of sequence b, all but its position.
template <class Params>
QueryRow query_row(const Params& p, DType dtype, int64_t head_dim, int64_t b, int64_t outer, int64_t token, int h) {
  QueryRow row{};
  for (int64_t d = 0; d < head_dim; ++d) row.q.push_back(decode_number(dtype, p.q.data, p.q.offset(outer, token, h) + d));
  row.start = p.seq_starts ? p.seq_starts[b] : 0;
  row.causal = true;
  row.sm_scale = static_cast<double>(p.sm_scale);
  row.soft_cap = static_cast<double>(p.logits_soft_cap);
  row.slope = p.alibi_slopes ? static_cast<double>(p.alibi_slopes.at(b, h)) : 0.0;
  row.window = p.sliding_window;
  row.has_sink = static_cast<bool>(p.sinks);
  row.sink = p.sinks ? static_cast<double>(p.sinks[h]) : 0.0;
  return row;
}

template <class Params>
HeadKeys cached_keys(const Params& p, int64_t b, int64_t kv_head) {
  const KvCacheView& cache = p.cache;
  const VectorArray* codes[] = {&cache.k_codes, &cache.v_codes};
  const ScaleView* scales[] = {&cache.k_scale, &cache.v_scale};
  const KvFormat formats[] = {cache.format.k, cache.format.v};
  return decode_keys(p.seq_lens[b], cache.head_dim, [&](int which, int64_t j, int64_t d) {
    const int64_t page = p.page_table ? p.page_table.at(b, j / cache.page_size) : b, token = j % cache.page_size;
    const double offset = which == 0 && cache.k_offset ? static_cast<double>(cache.k_offset.at(kv_head, d)) : 0.0;
    return offset + decode_code(formats[which], codes[which]->data, codes[which]->offset(page, token, kv_head) + d) *
                        scale_at(*scales[which], page, token, kv_head);
  });
}

HeadKeys fresh_keys(const PrefillParams& p, int64_t b, int64_t kv_head) {
  const VectorArray* arrays[] = {&p.k, &p.v};
  const int64_t first = p.cu_seqlens_k[b];
  return decode_keys(p.cu_seqlens_k[b + 1] - first, p.head_dim, [&](int which, int64_t j, int64_t d) {
    return decode_number(p.dtype, arrays[which]->data, arrays[which]->offset(0, first + j, kv_head) + d);
  });
}

ReferenceResult empty_result(int64_t num_rows, int64_t head_dim) {
  return {std::vector<double>(static_cast<size_t>(num_rows * head_dim)), std::vector<double>(static_cast<size_t>(num_rows))};
}

void attend_into(const QueryRow& row, const HeadKeys& keys, int64_t index, ReferenceResult* result) {
  attend(row, keys, &result->out[static_cast<size_t>(index) * row.q.size()], &result->lse[static_cast<size_t>(index)]);
}

template <class Params, class KeysOf>
ReferenceResult reference_ragged(const Params& p, DType dtype, int64_t head_dim, int num_kv_heads, const KeysOf& keys_of) {
  ReferenceResult result = empty_result(p.num_q_tokens * p.num_q_heads, head_dim);
  const int group = p.num_q_heads / num_kv_heads;
  for (int b = 0; b < p.batch_size; ++b)
    for (int kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
      const HeadKeys keys = keys_of(p, b, kv_head);
      for (int64_t token = p.cu_seqlens_q[b]; token < p.cu_seqlens_q[b + 1]; ++token)
        for (int h = kv_head * group; h < (kv_head + 1) * group; ++h) {
          QueryRow row = query_row(p, dtype, head_dim, b, 0, token, h);
          row.causal = p.causal;
          row.position = keys.length - p.cu_seqlens_q[b + 1] + token;
          attend_into(row, keys, token * p.num_q_heads + h, &result);
        }
    }
  return result;
}

}  // namespace

double decode_half(uint16_t bits) { return decode_float(bits, 5, 10, false); }

double smallest_half_not_below(float x) {
  for (uint16_t bits = 0; bits < 0x7BFF; ++bits)
    if (decode_half(bits) >= static_cast<double>(x)) return decode_half(bits);
  return 65504.0;
}

double decode_code(KvFormat format, const void* codes, int64_t index) {
  switch (format) {
    case KvFormat::kFp16:
      return decode_half(static_cast<const uint16_t*>(codes)[index]);
    case KvFormat::kBf16:
      return decode_float(static_cast<const uint16_t*>(codes)[index], 8, 7, false);
    case KvFormat::kInt8:
      return static_cast<const int8_t*>(codes)[index];
    case KvFormat::kFp8E4M3:
      return decode_float(static_cast<const uint8_t*>(codes)[index], 4, 3, true);
    case KvFormat::kFp8E5M2:
      return decode_float(static_cast<const uint8_t*>(codes)[index], 5, 2, false);
  }
  return std::numeric_limits<double>::quiet_NaN();
}

double decode_number(DType dtype, const void* numbers, int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(numbers)[index];
    case DType::kFloat16:
      return decode_code(KvFormat::kFp16, numbers, index);
    case DType::kBFloat16:
      return decode_code(KvFormat::kBf16, numbers, index);
  }
  return std::numeric_limits<double>::quiet_NaN();
}

ReferenceResult reference_decode(const DecodeParams& p) {
  const int64_t head_dim = p.cache.head_dim;
  const int n = p.num_q_tokens, num_heads = p.num_q_heads, group = num_heads / p.cache.num_kv_heads;
  ReferenceResult result = empty_result(int64_t{p.batch_size} * n * num_heads, head_dim);
  for (int b = 0; b < p.batch_size; ++b)
    for (int kv_head = 0; kv_head < p.cache.num_kv_heads; ++kv_head) {
      const HeadKeys keys = cached_keys(p, b, kv_head);
      for (int i = 0; i < n; ++i)
        for (int h = kv_head * group; h < (kv_head + 1) * group; ++h) {
          QueryRow row = query_row(p, p.q_dtype, head_dim, b, b, i, h);
          row.position = keys.length - n + i;
          attend_into(row, keys, (int64_t{b} * n + i) * num_heads + h, &result);
        }
    }
  return result;
}

ReferenceResult reference_hybrid(const HybridParams& p) {
  return reference_ragged(p, p.q_dtype, p.cache.head_dim, p.cache.num_kv_heads, cached_keys<HybridParams>);
}

ReferenceResult reference_prefill(const PrefillParams& p) {
  return reference_ragged(p, p.dtype, p.head_dim, p.num_kv_heads, fresh_keys);
}

}  // namespace quantattn_test
