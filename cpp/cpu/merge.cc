#include "cpu/merge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/isa_table.h"
#include "cpu/thread_pool.h"

namespace quantattn::cpu {
namespace {

constexpr int kBlock = 256;        // elements merged at once
constexpr int64_t kItemRows = 64;  // rows of one work item

struct MergeWeights {
  float a, b, lse;
};

MergeWeights merge_weights(float lse_a, float lse_b) {
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  if (lse_a == kEmpty && lse_b == kEmpty) return {0.f, 0.f, kEmpty};
  const float max = std::max(lse_a, lse_b);
  const float a = std::exp(lse_a - max), b = std::exp(lse_b - max);
  return {a / (a + b), b / (a + b), max + std::log(a + b)};
}

// A state without keys has no say, whatever its `out` holds.
float weighted(float weight, float x) { return weight == 0.f ? 0.f : weight * x; }

void merge_row(const MergeParams& p, const EdgeStages& edge, int64_t row) {
  const int64_t head = row % p.num_q_heads, token = row / p.num_q_heads % p.num_q_tokens;
  const int64_t batch = row / p.num_q_heads / p.num_q_tokens;
  const MergeWeights weights = merge_weights(p.lse_a[row], p.lse_b[row]);
  const int64_t bytes = bytes_of(p.dtype);
  const auto at = [&](const VectorArray& array) {
    return static_cast<char*>(array.data) + array.offset(batch, token, head) * bytes;
  };
  for (int first = 0; first < p.head_dim; first += kBlock) {
    const int count = std::min(kBlock, p.head_dim - first);
    float a[kBlock], b[kBlock];
    edge.load(at(p.out_a) + first * bytes, p.dtype, count, a);
    edge.load(at(p.out_b) + first * bytes, p.dtype, count, b);
    for (int i = 0; i < count; ++i) a[i] = weighted(weights.a, a[i]) + weighted(weights.b, b[i]);
    edge.store(a, 1.f, count, p.dtype, at(p.out) + first * bytes);
  }
  p.lse[row] = weights.lse;
}

}  // namespace

void merge(const MergeParams& p, const Execution& execution) {
  const EdgeStages& edge = preferred_isa().stages->edge;
  const int64_t num_rows = p.batch_size * p.num_q_tokens * p.num_q_heads, num_items = (num_rows + kItemRows - 1) / kItemRows;
  parallel_for(resolve_num_threads(execution), num_items, [&](int64_t item, int) {
    const int64_t end = std::min(num_rows, (item + 1) * kItemRows);
    for (int64_t row = item * kItemRows; row < end; ++row) merge_row(p, edge, row);
  });
}

}  // namespace quantattn::cpu
