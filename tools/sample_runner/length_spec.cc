#include "length_spec.h"

#include <cmath>
#include <limits>
#include <string>

#include "option_parser.h"
#include "random_rows.h"

namespace sample_runner {
namespace {

constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();

int32_t parse_length(std::string_view who, std::string_view text) {
  return static_cast<int32_t>(parse_integer(who, text, 0, kMaxLength));
}

int32_t draw_lognormal(const LengthSpec& spec, uint64_t seed) {
  const double variance = std::log1p(spec.variation * spec.variation);
  float normal = 0;
  fill_normal(seed, {&normal, 1});
  const double length = std::exp(std::log(spec.mean) - variance / 2 + std::sqrt(variance) * normal);
  return static_cast<int32_t>(std::fmin(std::fmax(std::round(length), 1.), static_cast<double>(kMaxLength)));
}

}  // namespace

LengthSpec parse_lengths(std::string_view who, std::string_view text) {
  const std::vector<std::string_view> parts = split(text, ':');
  if (parts[0] == "uniform" && parts.size() == 3) {
    const int32_t least = parse_length(who, parts[1]), most = parse_length(who, parts[2]);
    if (least > most) fail_usage(who, "uniform:MIN:MAX with MIN <= MAX", text);
    return {LengthSpec::Kind::kUniform, {least, most}, 0, 0};
  }
  if (parts[0] == "lognormal" && parts.size() == 3) {
    const LengthSpec spec{LengthSpec::Kind::kLognormal, {}, parse_number(who, parts[1]), parse_number(who, parts[2])};
    if (spec.mean < 1 || spec.mean > static_cast<double>(kMaxLength) || spec.variation < 0)
      fail_usage(who, "lognormal:MEAN:CV with 1 <= MEAN < 2^31 and CV >= 0", text);
    return spec;
  }
  if (parts.size() > 1) fail_usage(who, "N, A,B,..., uniform:MIN:MAX or lognormal:MEAN:CV", text);
  LengthSpec spec{LengthSpec::Kind::kFixed, {}, 0, 0};
  for (std::string_view value : split(text, ',')) spec.values.push_back(parse_length(who, value));
  return spec;
}

std::vector<int32_t> draw_lengths(const LengthSpec& spec, int num_sequences, uint64_t seed) {
  std::vector<int32_t> lengths;
  for (int b = 0; b < num_sequences; ++b) {
    const uint64_t sequence_seed = mix(seed, static_cast<uint64_t>(b));
    switch (spec.kind) {
      case LengthSpec::Kind::kFixed:
        lengths.push_back(spec.values[spec.values.size() > 1 ? static_cast<size_t>(b) : 0]);
        break;
      case LengthSpec::Kind::kUniform: {
        const uint64_t span = static_cast<uint64_t>(spec.values[1] - spec.values[0]) + 1;
        lengths.push_back(static_cast<int32_t>(spec.values[0] + static_cast<int64_t>(sequence_seed % span)));
        break;
      }
      case LengthSpec::Kind::kLognormal:
        lengths.push_back(draw_lognormal(spec, sequence_seed));
        break;
    }
  }
  return lengths;
}

}  // namespace sample_runner
