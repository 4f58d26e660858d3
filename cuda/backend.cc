#include "core/backend.h"

#include "decode/instances.h"
#include "device.h"
#include "operations.h"
#include "prefill/instances.h"

namespace quantattn {

const Backend& cuda_backend() {
  static constexpr Backend backend = {&cuda::describe,     &cuda::decode_kernels, &cuda::plan_decode, &cuda::quantize,
                                      &cuda::dequantize,   &cuda::append,         &cuda::merge,       &cuda::prefill_kernels,
                                      &cuda::plan_prefill, &cuda::run_prefill};
  return backend;
}

}  // namespace quantattn
