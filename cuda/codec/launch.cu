#include <algorithm>

#include "codec/kernels.cuh"
#include "core/fail.h"
#include "device.h"
#include "operations.h"

namespace quantattn::cuda {

// generated/cuda_formats.def has one row QATTN_CUDA_FORMAT(table) for each format, in the order of KvFormat.
#define QATTN_CUDA_FORMAT(table) FormatKernels table();
#include "generated/cuda_formats.def"
#undef QATTN_CUDA_FORMAT

namespace {

const FormatKernels& kernels_of(KvFormat format) {
  static const FormatKernels kernels[] = {
#define QATTN_CUDA_FORMAT(table) table(),
#include "generated/cuda_formats.def"
#undef QATTN_CUDA_FORMAT
  };
  return kernels[static_cast<int>(format)];
}

void launch(void (*kernel)(CodecParams), const CodecParams& params, const Execution& execution, std::string_view who) {
  constexpr int64_t kMaxGridY = 65535;
  const int64_t page_vectors = params.page_size * params.num_heads;
  if (page_vectors == 0 || params.num_pages == 0) return;
  require(page_vectors <= INT32_MAX, who, ": a page must have at most 2^31 - 1 vectors, got ", page_vectors);
  const dim3 grid(static_cast<unsigned>((page_vectors + kCodecTeams - 1) / kCodecTeams),
                  static_cast<unsigned>(std::min(params.num_pages, kMaxGridY)));
  const DeviceScope scope(execution.device.index, who);
  kernel<<<grid, kCodecThreads, 0, stream_of(execution)>>>(params);
  check(cudaGetLastError(), who, "launching the codec kernel");
}

}  // namespace

void quantize(const CodecParams& params, const Execution& execution) {
  launch(kernels_of(params.format).quantize, params, execution, "quantize_kv");
}

void dequantize(const CodecParams& params, const Execution& execution) {
  launch(kernels_of(params.format).dequantize, params, execution, "dequantize_kv");
}

}  // namespace quantattn::cuda
