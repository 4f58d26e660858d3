#include "core/backend.h"

#include "decode/instances.h"
#include "device.h"
#include "hybrid/hybrid.h"
#include "operations.h"
#include "prefill/instances.h"

namespace quantattn {

const Backend& cuda_backend() {
  static constexpr Backend backend = {.device = DeviceKind::kCuda,
                                      .describe = &cuda::describe,
                                      .decode_kernels = &cuda::decode_kernels,
                                      .plan_decode = &cuda::plan_decode,
                                      .quantize = &cuda::quantize,
                                      .dequantize = &cuda::dequantize,
                                      .append = &cuda::append,
                                      .merge = &cuda::merge,
                                      .prefill_kernels = &cuda::prefill_kernels,
                                      .plan_prefill = &cuda::plan_prefill,
                                      .run_prefill = &cuda::run_prefill,
                                      .plan_hybrid = &cuda::plan_hybrid,
                                      .run_hybrid = &cuda::run_hybrid};
  return backend;
}

}  // namespace quantattn
