#include "compare.h"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <sstream>

namespace sample_runner {
namespace {

constexpr double kSumRounding = 1e-6;       // a few float32 roundings, relative to the terms that were added
constexpr double kHalfUnderflow = 0x1p-25;  // half a step of float16 near zero
constexpr size_t kMaxFailures = 5;          // enough to see a pattern

// NaN wins: an error that is not a number must not hide.
double largest_of(double a, double b) { return std::isnan(a) || a > b ? a : b; }

double l2(const double* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i] * values[i];
  return std::sqrt(sum);
}

// "sequence 1, token 0, head 3: ..."
template <class... Parts>
void add_failure(Comparison& comparison, const Problem& p, int64_t row, const Parts&... parts) {
  if (comparison.failures.size() >= kMaxFailures) return;
  const int64_t token = row / p.num_q_heads;
  const auto next = std::ranges::upper_bound(p.cu_seqlens_q, token);  // past sequences without query tokens
  std::ostringstream text;
  text << std::setprecision(9) << "sequence " << next - p.cu_seqlens_q.begin() - 1 << ", token " << token - next[-1]
       << ", head " << row % p.num_q_heads << ": ";
  (text << ... << parts);
  comparison.failures.push_back(text.str());
}

void compare_lse(const Problem& p, int64_t row, double lse, double expected, double tolerance, Comparison& comparison) {
  const double error = lse == expected ? 0. : std::fabs(lse - expected);  // equal infinities differ by nothing
  const double bound = tolerance * std::max(1., std::fabs(expected));
  comparison.max_lse_error = largest_of(comparison.max_lse_error, error);
  if (!(error <= bound)) add_failure(comparison, p, row, "log-sum-exp must be ", expected, ", got ", lse);
}

void compare_row(const Problem& p, int64_t row, const AttentionResult& result, const ReferenceResult& reference,
                 double tolerance, Comparison& comparison) {
  std::vector<double> difference(static_cast<size_t>(p.head_dim));
  const int64_t start = row * p.head_dim;
  for (int64_t d = 0; d < p.head_dim; ++d)
    difference[static_cast<size_t>(d)] =
        result.out[static_cast<size_t>(start + d)] - reference.out[static_cast<size_t>(start + d)];
  for (double x : difference) {
    comparison.max_error = largest_of(comparison.max_error, std::fabs(x));
    comparison.mean_error += std::fabs(x) / static_cast<double>(result.out.size());
  }
  const double error = l2(difference.data(), p.head_dim), size = l2(reference.out.data() + start, p.head_dim);
  const double underflow = p.q_dtype == quantattn::DType::kFloat16 ? kHalfUnderflow * std::sqrt(p.head_dim) : 0;
  const double bound = tolerance * size + kSumRounding * l2(reference.magnitude.data() + start, p.head_dim) + underflow;
  if (size > 0) comparison.worst_row_relative_l2 = largest_of(comparison.worst_row_relative_l2, error / size);
  if (!std::isfinite(size))
    add_failure(comparison, p, row, "the reference must be finite, got ", size, ": the cache holds a NaN or infinity");
  else if (!(error <= bound))
    add_failure(comparison, p, row, "the L2 error must be at most ", bound, ", got ", error);
}

}  // namespace

double default_tolerance(quantattn::DType dtype) {
  constexpr double kKernelTolerance = 1e-3;
  if (dtype == quantattn::DType::kFloat16) return kKernelTolerance + 0x1p-11;
  if (dtype == quantattn::DType::kBFloat16) return kKernelTolerance + 0x1p-8;
  return kKernelTolerance;
}

double relative_l2(const std::vector<double>& values, const std::vector<double>& reference) {
  double error = 0, size = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    error += (values[i] - reference[i]) * (values[i] - reference[i]);
    size += reference[i] * reference[i];
  }
  return error == 0 ? 0 : std::sqrt(error / size);
}

Comparison compare(const Problem& p, const AttentionResult& result, const ReferenceResult& reference, double tolerance) {
  Comparison comparison;
  for (int64_t row = 0; row < p.num_q_rows(); ++row) {
    compare_row(p, row, result, reference, tolerance, comparison);
    compare_lse(p, row, result.lse[static_cast<size_t>(row)], reference.lse[static_cast<size_t>(row)], tolerance, comparison);
  }
  comparison.relative_l2 = relative_l2(result.out, reference.out);
  return comparison;
}

}  // namespace sample_runner
