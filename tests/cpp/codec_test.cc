// quantize_kv and dequantize_kv against the formats' definitions.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "problem.h"
#include "reference.h"

using namespace quantattn;
using namespace quantattn_test;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

CodecParams flat(KvFormat format, std::vector<float>& values, std::vector<uint8_t>& codes, ScaleView scale, int head_dim) {
  const auto num_tokens = static_cast<int64_t>(values.size()) / head_dim;
  return {.format = format,
          .values = {values.data(), 0, head_dim, 0},
          .codes = {codes.data(), 0, head_dim, 0},
          .scale = scale,
          .num_pages = 1,
          .page_size = num_tokens,
          .num_heads = 1,
          .head_dim = head_dim};
}

double max_code(KvFormat format) { return format == KvFormat::kInt8 ? 127 : format == KvFormat::kFp8E4M3 ? 448 : 57344; }

// Every code decodes to its definition and encodes back to itself.
void codes_round_trip(KvFormat format) {
  const int num_codes = code_bytes(format) == 1 ? 256 : 65536;
  std::vector<uint8_t> codes(static_cast<size_t>(num_codes * code_bytes(format))), again(codes.size());
  for (int i = 0; i < num_codes; ++i) {
    if (code_bytes(format) == 1)
      codes[static_cast<size_t>(i)] = static_cast<uint8_t>(i);
    else
      reinterpret_cast<uint16_t*>(codes.data())[i] = static_cast<uint16_t>(i);
  }
  float one = 1.f;
  const ScaleView scale = info(format).has_scale ? ScaleView{ScaleGranularity::kTensor, &one} : ScaleView{};
  std::vector<float> values(static_cast<size_t>(num_codes), -1.f);
  dequantize_kv(flat(format, values, codes, scale, 64), {});
  for (int i = 0; i < num_codes; ++i) {
    const double expected = decode_code(format, codes.data(), i), actual = values[static_cast<size_t>(i)];
    CHECK(actual == expected || (std::isnan(actual) && std::isnan(expected)), name(format), " code ", i, ": ", actual,
          ", expected ", expected);
  }
  quantize_kv(flat(format, values, again, scale, 64), {});
  for (int i = 0; i < num_codes; ++i) {
    const double value = decode_code(format, codes.data(), i), back = decode_code(format, again.data(), i);
    const bool is_same = std::isnan(value) ? std::isnan(back) : back == std::clamp(value, -max_code(format), max_code(format));
    CHECK(is_same || (!info(format).has_scale && back == value), name(format), " code ", i, " came back as ", back);
  }
}

// The nearest representable value, by comparison with every code; ties may go to either neighbour here.
void encoding_is_nearest(KvFormat format) {
  uint32_t state = 5;
  std::vector<float> values(64 * 64);
  for (float& x : values) x = uniform(state) * std::exp2(24.f * uniform(state));
  std::vector<uint8_t> codes(values.size());
  float one = 1.f;
  quantize_kv(flat(format, values, codes, {ScaleGranularity::kTensor, &one}, 64), {});
  for (size_t i = 0; i < values.size(); ++i) {
    const double x = std::clamp<double>(values[i], -max_code(format), max_code(format));
    double best = kInfinity;
    for (int c = 0; c < 256; ++c) {
      const auto code = static_cast<uint8_t>(c);
      const double distance = std::abs(decode_code(format, &code, 0) - x);
      if (distance < best) best = distance;
    }
    CHECK(std::abs(decode_code(format, codes.data(), static_cast<int64_t>(i)) - x) == best, name(format), " of ", values[i]);
  }
}

// amax / max_code rounded up to float16; infinities and NaN do not count; a zero vector has scale 0 and codes 0.
void dynamic_scales(KvFormat format) {
  for (float amax : {0.f, 1e-45f, 1e-38f, 1e-8f, 3e-6f, 0.1f, 1.f, 333.f, 65504.f, 1e9f, 3e38f}) {
    std::vector<float> values(64, 0.f);
    values[3] = -amax;
    values[7] = amax / 2;
    values[9] = kInfinity;
    values[11] = kNaN;
    std::vector<uint8_t> codes(64, 0xAA);
    uint16_t scale = 0xFFFF;
    quantize_kv(flat(format, values, codes, {ScaleGranularity::kTokenHead, &scale, 0, 1, 1}, 64), {});
    const double expected = smallest_half_not_below(amax / static_cast<float>(max_code(format)));
    CHECK(decode_half(scale) == expected, name(format), " amax ", amax, ": scale ", decode_half(scale), ", expected ",
          expected);
    const double largest = decode_code(format, codes.data(), 3);
    if (expected == 0) CHECK(codes[3] == 0 && codes[9] == 0 && codes[11] == 0, name(format), " amax ", amax);
    if (amax > 1e-2f && amax < 65504.f * 127)
      CHECK(std::abs(largest * expected + amax) <= amax * 0.04, name(format), " amax ", amax, " became ", largest * expected);
  }
}

}  // namespace

int main() {
  for (const KvFormatInfo& row : kKvFormats) {
    codes_round_trip(row.format);
    if (!row.has_scale) continue;
    encoding_is_nearest(row.format);
    dynamic_scales(row.format);
  }
  return finish("codec_test");
}
