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
          .offset = {},
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

// Codes of x with an offset are those of the difference; decoding adds the offset to what they stand for.
void offsets_are_taken_out_and_added(KvFormat format) {
  constexpr int kDim = 1100;  // more than is converted at once
  uint32_t state = 9;
  std::vector<float> offset(kDim), values(3 * kDim), differences(values.size()), decoded(values.size()), plain(values.size());
  for (float& x : offset) x = 50 * uniform(state);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = offset[i % kDim] + uniform(state);
    differences[i] = values[i] - offset[i % kDim];
  }
  std::vector<uint8_t> codes(values.size() * static_cast<size_t>(code_bytes(format))), expected(codes.size());
  std::vector<uint16_t> scale(3), expected_scale(3);
  const auto view = [&](std::vector<uint16_t>& halves) {
    return info(format).has_scale ? ScaleView{ScaleGranularity::kTokenHead, halves.data(), 0, 1, 0} : ScaleView{};
  };
  CodecParams centred = flat(format, values, codes, view(scale), kDim);
  centred.offset = {offset.data(), 0};
  quantize_kv(centred, {});
  quantize_kv(flat(format, differences, expected, view(expected_scale), kDim), {});
  CHECK(codes == expected && scale == expected_scale, name(format));
  centred.values.data = decoded.data();
  dequantize_kv(centred, {});
  dequantize_kv(flat(format, plain, codes, view(scale), kDim), {});
  for (size_t i = 0; i < values.size(); ++i)
    CHECK(decoded[i] == plain[i] + offset[i % kDim], name(format), " element ", i, ": ", decoded[i]);
}

void offsets_must_be_contiguous_and_aligned() {
  std::vector<float> values(64), offset(80);
  std::vector<uint8_t> codes(128);
  CodecParams params = flat(KvFormat::kFp16, values, codes, {}, 64);
  params.offset = {offset.data(), 0, 2};
  CHECK_THROWS(quantize_kv(params, {}), InvalidArgument, "quantize_kv: offset must be contiguous in its last dimension");
  params.offset = {reinterpret_cast<float*>(reinterpret_cast<char*>(offset.data()) + 2), 0, 1};
  CHECK_THROWS(dequantize_kv(params, {}), InvalidArgument, "dequantize_kv: offset must be aligned to 4 bytes");
  Problem problem({.has_offset = true});
  problem.params.cache.k_offset.column_stride = 2;
  CHECK_THROWS(validate(problem.params.cache, "cache"), InvalidArgument, "cache: k_offset must be contiguous");
}

}  // namespace

int main() {
  for (const KvFormatInfo& row : kKvFormats) {
    codes_round_trip(row.format);
    offsets_are_taken_out_and_added(row.format);
    if (!row.has_scale) continue;
    encoding_is_nearest(row.format);
    dynamic_scales(row.format);
  }
  offsets_must_be_contiguous_and_aligned();
  return finish("codec_test");
}
