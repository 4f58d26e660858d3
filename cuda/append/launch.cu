#include "append/kernel.cuh"
#include "core/fail.h"
#include "decode/instances.h"
#include "device.h"
#include "operations.h"

namespace quantattn::cuda {

void append(const AppendParams& params, const Execution& execution) {
  constexpr std::string_view who = "append_kv";
  const int64_t num_vectors = params.num_tokens * params.cache.num_kv_heads;
  if (num_vectors == 0) return;
  const int64_t num_blocks = (num_vectors + kAppendWarps - 1) / kAppendWarps;
  require(num_blocks <= INT32_MAX, who, ": k must have at most 2^33 vectors, got ", num_vectors);
  const DeviceScope scope(execution.device.index, who);
  for (const PairKernels* pair : all_pairs()) {
    if (pair->format != params.cache.format) continue;
    pair->append<<<dim3(static_cast<unsigned>(num_blocks), 2), 32 * kAppendWarps, 0, stream_of(execution)>>>(params);
    check(cudaGetLastError(), who, "launching the append kernel");
  }
}

}  // namespace quantattn::cuda
