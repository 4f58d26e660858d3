#include "append/kernel.cuh"
#include "core/fail.h"
#include "decode/instances.h"
#include "device.h"
#include "operations.h"

namespace quantattn::cuda {

void append(const AppendParams& params, const Execution& execution) {
  constexpr std::string_view who = "append_kv";
  if (params.num_tokens == 0 || params.cache.num_kv_heads == 0) return;
  require(params.num_tokens <= INT32_MAX, who, ": k must have at most 2^31 - 1 tokens, got ", params.num_tokens);
  const int64_t num_slots = params.cache.num_pages * params.cache.page_size;
  require(num_slots <= UINT32_MAX, who, ": a cache on a GPU must have at most 2^32 - 1 tokens, got ", num_slots);
  const DeviceScope scope(execution.device.index, who);
  for (const PairKernels* pair : all_pairs()) {
    if (pair->format != params.cache.format) continue;
    pair->append<<<dim3(static_cast<unsigned>(params.num_tokens), 2), kAppendThreads, 0, stream_of(execution)>>>(params);
    check(cudaGetLastError(), who, "launching the append kernel");
  }
}

}  // namespace quantattn::cuda
