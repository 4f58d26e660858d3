#pragma once

#include <string>
#include <vector>

#include "attention_run.h"
#include "reference.h"

namespace sample_runner {

struct Comparison {
  double max_error = 0, mean_error = 0;  // |out - reference|
  double relative_l2 = 0;                // over all rows
  double worst_row_relative_l2 = 0;      // of one query row
  double max_lse_error = 0;
  std::vector<std::string> failures;  // empty: the result is right
};

// Every row must be within `tolerance` of the reference in relative L2, plus what float32 sums of its terms may lose. A bound
// relative to the row, not an absolute one: a long context averages V down, and 1e-3 would hide a lost key.
Comparison compare(const Problem& problem, const AttentionResult& result, const ReferenceResult& reference, double tolerance);

// The kernels' bound, 1e-3, plus the rounding of the output's type.
double default_tolerance(quantattn::DType dtype);

double relative_l2(const std::vector<double>& values, const std::vector<double>& reference);

}  // namespace sample_runner
