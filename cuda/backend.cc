#include "core/backend.h"

#include "decode/instances.h"
#include "device.h"
#include "operations.h"

namespace quantattn {

const Backend& cuda_backend() {
  static constexpr Backend backend = {&cuda::describe,   &cuda::decode_kernels, &cuda::plan_decode, &cuda::quantize,
                                      &cuda::dequantize, &cuda::append,         &cuda::merge};
  return backend;
}

}  // namespace quantattn
