#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace sample_runner {

// Lengths of the sequences of a batch, as the command line gives them:
//   4096                every sequence the same
//   17,0,4096           one value for each sequence
//   uniform:MIN:MAX     drawn for each sequence, both ends included
//   lognormal:MEAN:CV   drawn with that mean and coefficient of variation, at least 1
struct LengthSpec {
  enum class Kind : uint8_t { kFixed, kUniform, kLognormal };
  Kind kind = Kind::kFixed;
  std::vector<int32_t> values = {0};  // kFixed: one, or one for each sequence; kUniform: MIN, MAX
  double mean = 0, variation = 0;     // kLognormal

  // The number of sequences that the text itself fixes; 0 where any number will do.
  int num_sequences() const { return kind == Kind::kFixed && values.size() > 1 ? static_cast<int>(values.size()) : 0; }
};

LengthSpec parse_lengths(std::string_view who, std::string_view text);
std::vector<int32_t> draw_lengths(const LengthSpec& spec, int num_sequences, uint64_t seed);

}  // namespace sample_runner
