#pragma once

#include <cuda_runtime.h>

#include "device.h"

namespace quantattn::cuda {

// Launches a kernel that may take its place while the one before it in the stream ends; see let_next_start().
template <class Task>
void launch_dependent(void (*entry)(Task), dim3 num_blocks, int num_threads, int shared_bytes, const Execution& execution,
                      const Task& task, std::string_view who, std::string_view what) {
  const DeviceScope scope(execution.device.index, who);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = num_blocks;
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream_of(execution);
  config.attrs = &attribute;
  config.numAttrs = waits_for_previous(reinterpret_cast<const void*>(entry), execution.device.index, who) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, entry, task), who, what);
}

}  // namespace quantattn::cuda
