#include "number_types.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace sample_runner {
namespace {

// sign, exponent, mantissa from the high bit down; exponent field 0 holds the subnormal numbers.
struct FloatLayout {
  int exponent_bits, mantissa_bits, bias;
  bool has_infinity;  // otherwise only the all-ones pattern is special, and it is NaN
};
constexpr FloatLayout kFloat16{5, 10, 15, true}, kBFloat16{8, 7, 127, true}, kE4M3{4, 3, 7, false}, kE5M2{5, 2, 15, true};

double decode_float(const FloatLayout& layout, uint32_t bits) {
  const uint32_t mantissa_count = 1u << layout.mantissa_bits, exponent_count = 1u << layout.exponent_bits;
  const uint32_t mantissa = bits % mantissa_count, exponent = bits / mantissa_count % exponent_count;
  const double sign = bits / mantissa_count / exponent_count ? -1. : 1.;
  if (exponent == exponent_count - 1) {
    if (layout.has_infinity && mantissa == 0) return sign * std::numeric_limits<double>::infinity();
    if (layout.has_infinity || mantissa == mantissa_count - 1) return std::numeric_limits<double>::quiet_NaN();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - layout.bias - layout.mantissa_bits);
  return sign * std::ldexp(mantissa_count + mantissa, static_cast<int>(exponent) - layout.bias - layout.mantissa_bits);
}

uint16_t encode_float(const FloatLayout& layout, double value) {
  const uint32_t sign = std::signbit(value) ? 1u << (layout.exponent_bits + layout.mantissa_bits) : 0u;
  const uint32_t infinity = ((1u << layout.exponent_bits) - 1) << layout.mantissa_bits;
  if (std::isnan(value)) return static_cast<uint16_t>(infinity + 1);
  if (value == 0) return static_cast<uint16_t>(sign);
  const double magnitude = std::fabs(value);
  const int least_exponent = 1 - layout.bias;
  const int exponent = std::isinf(magnitude) ? layout.bias + 1 : std::max(std::ilogb(magnitude), least_exponent);
  if (exponent > layout.bias) return static_cast<uint16_t>(sign | infinity);
  // Counted in steps of its exponent, a number that rounds up to the next power of two carries into the exponent field.
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, layout.mantissa_bits - exponent)));
  return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(exponent - least_exponent) << layout.mantissa_bits) + steps));
}

std::vector<double> float_values(const FloatLayout& layout) {
  std::vector<double> values(size_t{2} << (layout.exponent_bits + layout.mantissa_bits));
  for (uint32_t bits = 0; bits < values.size(); ++bits) values[bits] = decode_float(layout, bits);
  return values;
}

std::vector<double> int8_values() {
  std::vector<double> values(256);
  for (int bits = 0; bits < 256; ++bits) values[static_cast<size_t>(bits)] = bits < 128 ? bits : bits - 256;
  return values;
}

std::vector<double> values_of(quantattn::KvFormat format) {
  switch (format) {
    case quantattn::KvFormat::kFp16:
      return float_values(kFloat16);
    case quantattn::KvFormat::kBf16:
      return float_values(kBFloat16);
    case quantattn::KvFormat::kInt8:
      return int8_values();
    case quantattn::KvFormat::kFp8E4M3:
      return float_values(kE4M3);
    case quantattn::KvFormat::kFp8E5M2:
      return float_values(kE5M2);
  }
  return {};
}

const FloatLayout& layout_of(quantattn::DType dtype) { return dtype == quantattn::DType::kFloat16 ? kFloat16 : kBFloat16; }

}  // namespace

std::span<const double> code_values(quantattn::KvFormat format) {
  static const std::vector<std::vector<double>> tables = [] {
    std::vector<std::vector<double>> all;
    for (const quantattn::KvFormatInfo& row : quantattn::kKvFormats) all.push_back(values_of(row.format));
    return all;
  }();
  return tables[static_cast<size_t>(format)];
}

double max_code(quantattn::KvFormat format) {
  double largest = 0;
  for (double value : code_values(format))
    if (std::isfinite(value)) largest = std::max(largest, value);
  return largest;
}

double decode(quantattn::DType dtype, const void* data, int64_t index) {
  if (dtype == quantattn::DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return decode_float(layout_of(dtype), bits);
}

void encode(quantattn::DType dtype, float value, void* data, int64_t index) {
  if (dtype == quantattn::DType::kFloat32)
    static_cast<float*>(data)[index] = value;
  else
    static_cast<uint16_t*>(data)[index] = encode_float(layout_of(dtype), value);
}

}  // namespace sample_runner
