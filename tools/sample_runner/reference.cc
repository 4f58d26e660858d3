#include "reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "number_types.h"
#include "parallel.h"

namespace sample_runner {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// In as many running sums as the compiler can keep in vector registers.
double dot(const double* a, const double* b, int64_t count) {
  constexpr int64_t kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int64_t lane = 0; lane < kSums; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (; i < count; ++i) sums[0] += a[i] * b[i];
  return std::accumulate(sums, sums + kSums, 0.);
}

// Scores of one query row against the visible keys, in order.
std::vector<double> scores_of(const Problem& p, int b, int64_t token, int head, VisibleKeys keys,
                              const std::vector<double>& k) {
  const int64_t dim = p.head_dim, row = p.row(b, token, head);
  std::vector<double> q(static_cast<size_t>(dim)), scores;
  for (int64_t d = 0; d < dim; ++d) q[static_cast<size_t>(d)] = decode(p.q_dtype, p.q.data(), row * dim + d);
  const float* slopes = p.alibi_slopes.empty() ? nullptr : p.alibi_slopes.data() + b * p.alibi_row_stride();
  for (int64_t j = keys.first; j < keys.last; ++j) {
    double score = p.sm_scale * dot(q.data(), k.data() + j * dim, dim);
    if (p.logits_soft_cap > 0) score = p.logits_soft_cap * std::tanh(score / p.logits_soft_cap);
    if (slopes != nullptr) score += slopes[head] * static_cast<double>(j - keys.position);
    scores.push_back(score);
  }
  return scores;
}

double log_sum_exp(const std::vector<double>& scores, const float* sink) {
  double largest = sink != nullptr ? *sink : -kInfinity;
  for (double score : scores) largest = std::isnan(score) ? score : std::max(largest, score);
  if (largest == -kInfinity) return -kInfinity;
  double sum = sink != nullptr ? std::exp(*sink - largest) : 0;
  for (double score : scores) sum += std::exp(score - largest);
  return largest + std::log(sum);
}

void attend_row(const Problem& p, int b, int64_t token, int head, const std::vector<double>& k, const std::vector<double>& v,
                ReferenceResult& result) {
  const int64_t dim = p.head_dim, row = p.row(b, token, head);
  const VisibleKeys keys = visible_keys(p, b, token);
  const std::vector<double> scores = scores_of(p, b, token, head, keys, k);
  const double lse = log_sum_exp(scores, p.sinks.empty() ? nullptr : &p.sinks[static_cast<size_t>(head)]);
  double* out = result.out.data() + row * dim;
  double* magnitude = result.magnitude.data() + row * dim;
  result.lse[static_cast<size_t>(row)] = lse;
  for (size_t i = 0; i < scores.size(); ++i) {
    const double probability = std::exp(scores[i] - lse);
    const double* value = v.data() + (keys.first + static_cast<int64_t>(i)) * dim;
    for (int64_t d = 0; d < dim; ++d) {
      out[d] += probability * value[d];
      magnitude[d] += probability * std::fabs(value[d]);
    }
  }
}

}  // namespace

ReferenceResult attend_in_float64(const Problem& p, const KvReader& read_kv) {
  const auto num_rows = static_cast<size_t>(p.num_q_rows()), num_elements = num_rows * static_cast<size_t>(p.head_dim);
  ReferenceResult result{std::vector<double>(num_elements), std::vector<double>(num_elements), std::vector<double>(num_rows)};
  const int group = p.num_q_heads / p.num_kv_heads;
  parallel_for(int64_t{p.batch_size} * p.num_kv_heads, [&](int64_t i) {
    const int b = static_cast<int>(i / p.num_kv_heads), kv_head = static_cast<int>(i % p.num_kv_heads);
    std::vector<double> k, v;
    read_kv(b, kv_head, p.seq_lens[static_cast<size_t>(b)], k, v);
    for (int64_t token = 0; token < p.num_q_tokens_of(b); ++token)
      for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) attend_row(p, b, token, head, k, v, result);
  });
  return result;
}

}  // namespace sample_runner
