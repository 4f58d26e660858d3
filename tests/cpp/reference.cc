#include "reference.h"

#include <algorithm>
#include <cmath>
#include <functional>
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

// Element d of key or value j of one KV head.
using Element = std::function<double(int64_t j, int64_t d)>;

// One query row and all that decides its result.
struct QueryRow {
  Element key, value;
  std::vector<double> q;
  int64_t position, start, length;  // it stands at `position` and sees some of the keys [start, length)
  bool causal;
  double sm_scale, soft_cap, slope;
  int window;
  bool has_sink;
  double sink;
};

double score(const QueryRow& row, int64_t j) {
  double s = 0;
  for (size_t d = 0; d < row.q.size(); ++d) s += row.q[d] * row.key(j, static_cast<int64_t>(d));
  s *= row.sm_scale;
  if (row.soft_cap > 0) s = row.soft_cap * std::tanh(s / row.soft_cap);
  return s + row.slope * static_cast<double>(j - row.position);
}

void attend(const QueryRow& row, double* out, double* lse) {
  std::vector<int64_t> keys;
  std::vector<double> scores;
  for (int64_t j = row.start; j < row.length; ++j) {
    if ((row.causal && j > row.position) || (row.window > 0 && row.position - j >= row.window)) continue;
    keys.push_back(j);
    scores.push_back(score(row, j));
  }
  double largest = row.has_sink ? row.sink : -std::numeric_limits<double>::infinity();
  for (double s : scores) largest = std::max(largest, s);
  double sum = row.has_sink ? std::exp(row.sink - largest) : 0;
  for (double s : scores) sum += std::exp(s - largest);
  *lse = keys.empty() && !row.has_sink ? largest : largest + std::log(sum);
  for (size_t d = 0; d < row.q.size(); ++d) {
    out[d] = 0;
    for (size_t k = 0; k < keys.size(); ++k) out[d] += std::exp(scores[k] - *lse) * row.value(keys[k], static_cast<int64_t>(d));
  }
}

// A row of sequence b, without its keys, position and length.
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
Element cached_element(const Params& p, const VectorArray& codes, const ScaleView& scale, KvFormat format, int64_t b, int h) {
  const int64_t kv_head = h / (p.num_q_heads / p.cache.num_kv_heads), page_size = p.cache.page_size;
  return [=, &p](int64_t j, int64_t d) {
    const int64_t page = p.page_table ? p.page_table.at(b, j / page_size) : b;
    return decode_code(format, codes.data, codes.offset(page, j % page_size, kv_head) + d) *
           scale_at(scale, page, j % page_size, kv_head);
  };
}

template <class Params>
void give_cached_keys(const Params& p, int64_t b, int h, QueryRow* row) {
  row->key = cached_element(p, p.cache.k_codes, p.cache.k_scale, p.cache.format.k, b, h);
  row->value = cached_element(p, p.cache.v_codes, p.cache.v_scale, p.cache.format.v, b, h);
  row->length = p.seq_lens[b];
}

ReferenceResult empty_result(int64_t num_rows, int64_t head_dim) {
  return {std::vector<double>(static_cast<size_t>(num_rows * head_dim)), std::vector<double>(static_cast<size_t>(num_rows))};
}

// `row_of(b, token, i, h)` is the row of query token i of sequence b, token `token` of the batch.
template <class Params, class RowOf>
ReferenceResult reference_ragged(const Params& p, int64_t head_dim, const RowOf& row_of) {
  ReferenceResult result = empty_result(p.num_q_tokens * p.num_q_heads, head_dim);
  for (int b = 0; b < p.batch_size; ++b)
    for (int64_t token = p.cu_seqlens_q[b]; token < p.cu_seqlens_q[b + 1]; ++token)
      for (int h = 0; h < p.num_q_heads; ++h) {
        QueryRow row = row_of(b, token, h);
        row.causal = p.causal;
        row.position = row.length - p.cu_seqlens_q[b + 1] + token;
        const int64_t index = token * p.num_q_heads + h;
        attend(row, &result.out[static_cast<size_t>(index * head_dim)], &result.lse[static_cast<size_t>(index)]);
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
  ReferenceResult result = empty_result(int64_t{p.batch_size} * p.num_q_tokens * p.num_q_heads, head_dim);
  int64_t index = 0;
  for (int b = 0; b < p.batch_size; ++b)
    for (int i = 0; i < p.num_q_tokens; ++i)
      for (int h = 0; h < p.num_q_heads; ++h, ++index) {
        QueryRow row = query_row(p, p.q_dtype, head_dim, b, b, i, h);
        give_cached_keys(p, b, h, &row);
        row.position = row.length - p.num_q_tokens + i;
        attend(row, &result.out[static_cast<size_t>(index * head_dim)], &result.lse[static_cast<size_t>(index)]);
      }
  return result;
}

ReferenceResult reference_hybrid(const HybridParams& p) {
  return reference_ragged(p, p.cache.head_dim, [&](int64_t b, int64_t token, int h) {
    QueryRow row = query_row(p, p.q_dtype, p.cache.head_dim, b, 0, token, h);
    give_cached_keys(p, b, h, &row);
    return row;
  });
}

ReferenceResult reference_prefill(const PrefillParams& p) {
  return reference_ragged(p, p.head_dim, [&](int64_t b, int64_t token, int h) {
    QueryRow row = query_row(p, p.dtype, p.head_dim, b, 0, token, h);
    const int64_t kv_head = h / (p.num_q_heads / p.num_kv_heads), first = p.cu_seqlens_k[b];
    const auto element = [&p, kv_head, first](const VectorArray& array) -> Element {
      return [=](int64_t j, int64_t d) { return decode_number(p.dtype, array.data, array.offset(0, first + j, kv_head) + d); };
    };
    row.key = element(p.k);
    row.value = element(p.v);
    row.length = p.cu_seqlens_k[b + 1] - first;
    return row;
  });
}

}  // namespace quantattn_test
