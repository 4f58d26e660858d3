// Host side of the Hopper kernel. Reads host values only.
#include <algorithm>

#include "core/fail.h"
#include "launch.h"
#include "prefill/hopper_instances.h"
#include "prefill/hopper_map.h"

namespace quantattn::cuda {
namespace {

const HopperInstance* find_instance(KvPair format, int head_dim) {
#if QATTN_HOPPER
  if (format.k == format.v)
    for (const HopperInstance& instance : hopper_instances(format.k))
      if (instance.head_dim >= head_dim) return &instance;
#else
  (void)format, (void)head_dim;
#endif
  return nullptr;
}

}  // namespace

bool runs_hopper() {
#if QATTN_HOPPER
  return has_hopper_device();
#else
  return false;
#endif
}

std::optional<HopperLaunch> plan_hopper(const PrefillTask& task, KvPair format, const Execution& execution,
                                        std::string_view who) {
  const HopperInstance* instance = find_instance(format, task.head_dim);
  if (instance == nullptr || !device_limits(execution.device.index, who).is_hopper) return std::nullopt;
  // Key offsets count where scores are not only compared with each other.
  if (task.k_offset && (task.logits_soft_cap > 0.f || task.sinks || task.lse != nullptr)) return std::nullopt;
  HopperTask hopper = {};
  hopper.prefill = task;
  if (!plan_copies(hopper, *instance)) return std::nullopt;
  return HopperLaunch{instance, hopper};
}

void run_hopper(const HopperLaunch& launch, int num_kv_heads, const Execution& execution, std::string_view who) {
  const HopperInstance* instance = launch.instance;
  const PrefillTask& task = launch.task.prefill;
  const int64_t num_rows = int64_t{task.num_q_tokens} * task.group_size.divisor;
  const int64_t num_tiles = num_rows / instance->block_rows + std::min(task.batch_size, task.num_q_tokens / task.fewest_tokens);
  require(num_kv_heads <= 65535, who, ": cache must have at most 65535 KV heads, got ", num_kv_heads);
  require(num_tiles <= INT32_MAX, who, ": q must have at most 2^31 rows per KV head, got ", num_rows);
  if (num_tiles == 0) return;
  const DeviceScope scope(execution.device.index, who);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(instance->entry), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             instance->shared_bytes),
        who, "preparing the Hopper prefill kernel");
  launch_dependent(instance->entry, dim3(static_cast<unsigned>(num_tiles), static_cast<unsigned>(num_kv_heads)),
                   instance->threads, instance->shared_bytes, execution, launch.task, who,
                   "launching the Hopper prefill kernel");
}

}  // namespace quantattn::cuda
