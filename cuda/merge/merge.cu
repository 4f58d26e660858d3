#include "codec/vector_codec.cuh"
#include "core/fail.h"
#include "device.h"
#include "operations.h"

namespace quantattn::cuda {
namespace {

constexpr int kMergeWarps = 4;

// One warp for each row. Every lane reads both log-sum-exps before one of them is overwritten.
__global__ void __launch_bounds__(32 * kMergeWarps) merge_kernel(const __grid_constant__ MergeParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (index >= p.batch_size * p.num_q_tokens * p.num_q_heads) return;
  const int64_t head = index % p.num_q_heads, row = index / p.num_q_heads;
  const int64_t token = row % p.num_q_tokens, sequence = row / p.num_q_tokens;
  const float lse_a = p.lse_a[index], lse_b = p.lse_b[index], maximum = fmaxf(lse_a, lse_b);
  const float base = maximum == -INFINITY ? 0.f : maximum;  // two empty sides: (-inf) - (-inf) would be NaN
  const float a = expf(lse_a - base), b = expf(lse_b - base), sum = a + b;
  const float weight_a = sum != 0.f ? a / sum : 0.f, weight_b = sum != 0.f ? b / sum : 0.f;
  __syncwarp();
  for (int d = lane; d < p.head_dim; d += 32) {
    // A side without weight does not count, whatever it holds; one that is NaN does.
    const float x =
        weight_a != 0.f ? weight_a * read_value(p.out_a.data, p.out_a.offset(sequence, token, head) + d, p.dtype) : 0.f;
    const float y =
        weight_b != 0.f ? weight_b * read_value(p.out_b.data, p.out_b.offset(sequence, token, head) + d, p.dtype) : 0.f;
    write_value(p.out.data, p.out.offset(sequence, token, head) + d, p.dtype, x + y);
  }
  if (lane == 0) p.lse[index] = base + logf(sum);
}

}  // namespace

void merge(const MergeParams& params, const Execution& execution) {
  constexpr std::string_view who = "merge_states";
  const int64_t num_rows = params.batch_size * params.num_q_tokens * params.num_q_heads;
  if (num_rows == 0) return;
  const int64_t num_blocks = (num_rows + kMergeWarps - 1) / kMergeWarps;
  require(num_blocks <= INT32_MAX, who, ": out_a must have at most 2^33 rows, got ", num_rows);
  const DeviceScope scope(execution.device.index, who);
  merge_kernel<<<static_cast<unsigned>(num_blocks), 32 * kMergeWarps, 0, stream_of(execution)>>>(params);
  check(cudaGetLastError(), who, "launching the merge kernel");
}

}  // namespace quantattn::cuda
