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

struct Row {
  const VectorArray& codes;
  const ScaleView& scale;
  KvFormat format;
};

double element(const Row& row, int64_t page, int64_t token, int64_t head, int64_t d) {
  return decode_code(row.format, row.codes.data, row.codes.offset(page, token, head) + d) *
         scale_at(row.scale, page, token, head);
}

struct QueryRow {
  int b, i, h;
};

double score(const DecodeParams& p, QueryRow row, int64_t page, int64_t slot, int64_t distance) {
  const KvCacheView& cache = p.cache;
  const int kv_head = row.h / (p.num_q_heads / cache.num_kv_heads);
  const float* q = p.q.at<const float>(row.b, row.i, row.h);
  double s = 0;
  for (int d = 0; d < cache.head_dim; ++d)
    s += q[d] * element({cache.k_codes, cache.k_scale, cache.format.k}, page, slot, kv_head, d);
  s *= p.sm_scale;
  if (p.logits_soft_cap > 0) s = p.logits_soft_cap * std::tanh(s / p.logits_soft_cap);
  if (p.alibi_slopes) s -= static_cast<double>(p.alibi_slopes.at(row.b, row.h)) * static_cast<double>(distance);
  return s;
}

void attend(const DecodeParams& p, QueryRow row, double* out, double* lse) {
  const KvCacheView& cache = p.cache;
  const int64_t length = p.seq_lens[row.b], position = length - p.num_q_tokens + row.i;
  const int kv_head = row.h / (p.num_q_heads / cache.num_kv_heads);
  const auto page_of = [&](int64_t j) {
    return p.page_table ? p.page_table.at(row.b, j / cache.page_size) : static_cast<int64_t>(row.b);
  };
  std::vector<int64_t> keys;
  std::vector<double> scores;
  for (int64_t j = p.seq_starts ? p.seq_starts[row.b] : 0; j <= position && j < length; ++j) {
    if (p.sliding_window > 0 && position - j >= p.sliding_window) continue;
    keys.push_back(j);
    scores.push_back(score(p, row, page_of(j), j % cache.page_size, position - j));
  }
  double largest = p.sinks ? p.sinks[row.h] : -std::numeric_limits<double>::infinity();
  for (double s : scores) largest = std::max(largest, s);
  double sum = p.sinks ? std::exp(p.sinks[row.h] - largest) : 0;
  for (double s : scores) sum += std::exp(s - largest);
  *lse = keys.empty() && !p.sinks ? largest : largest + std::log(sum);
  for (int d = 0; d < cache.head_dim; ++d) {
    out[d] = 0;
    for (size_t k = 0; k < keys.size(); ++k)
      out[d] += std::exp(scores[k] - *lse) * element({cache.v_codes, cache.v_scale, cache.format.v}, page_of(keys[k]),
                                                     keys[k] % cache.page_size, kv_head, d);
  }
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

ReferenceResult reference_decode(const DecodeParams& p) {
  const int64_t num_rows = static_cast<int64_t>(p.batch_size) * p.num_q_tokens * p.num_q_heads;
  ReferenceResult result{std::vector<double>(static_cast<size_t>(num_rows * p.cache.head_dim)),
                         std::vector<double>(static_cast<size_t>(num_rows))};
  int64_t row = 0;
  for (int b = 0; b < p.batch_size; ++b)
    for (int i = 0; i < p.num_q_tokens; ++i)
      for (int h = 0; h < p.num_q_heads; ++h, ++row)
        attend(p, {b, i, h}, &result.out[static_cast<size_t>(row * p.cache.head_dim)], &result.lse[static_cast<size_t>(row)]);
  return result;
}

}  // namespace quantattn_test
