#include "device_memory.h"
#include "quantattn/error.h"

namespace sample_runner {

std::unique_ptr<DeviceMemory> open_cuda_device(int) {
  throw quantattn::Unsupported(
      "--device must be cpu, because this build has no CUDA backend (configure with -DQATTN_CUDA=ON), got cuda");
}

}  // namespace sample_runner
