#include "prefill/hopper_map.h"

#include <cuda_runtime_api.h>

#include <algorithm>

namespace quantattn::cuda {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// CUDA 12.5 deprecates the call that CUDA 12.0 has.
cudaError_t find_driver_function(const char* name, void** found, cudaDriverEntryPointQueryResult* result) {
#if CUDART_VERSION >= 12050
  return cudaGetDriverEntryPointByVersion(name, found, 12000, cudaEnableDefault, result);
#else
  return cudaGetDriverEntryPoint(name, found, cudaEnableDefault, result);
#endif
}

// The library is not linked with the driver; null where the driver lacks the function.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (find_driver_function("cuTensorMapEncodeTiled", &found, &result) != cudaSuccess || result != cudaDriverEntryPointSuccess)
      found = nullptr;
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

}  // namespace

int choose_box_rows(const PrefillTask& task, int tile_keys) {
  if (!task.page_table) return tile_keys;
  const int page_size = static_cast<int>(task.page_size.divisor);
  if (page_size % tile_keys == 0) return tile_keys;
  // Rows of an operand are permuted in groups of eight.
  return tile_keys % page_size == 0 && page_size % 8 == 0 ? page_size : 0;
}

bool encode_map(CUtensorMap& map, const PrefillTask& task, const CodeAddresses& codes, const HopperInstance& instance,
                int box_rows) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr || box_rows == 0) return false;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(std::max<int64_t>(n, 1)); };
  const int64_t num_heads = task.num_q_heads / static_cast<int>(task.group_size.divisor);
  const cuuint64_t sizes[4] = {size(task.head_dim), size(num_heads),
                               size(task.cu_seqlens_k ? task.num_k_tokens : task.page_size.divisor), size(task.num_pages)};
  // The stride of an axis of one element does not matter and may be anything.
  const auto stride = [](int64_t bytes, cuuint64_t n) {
    return static_cast<cuuint64_t>(n == 1 && bytes % 16 != 0 ? 16 : bytes);
  };
  const cuuint64_t strides[3] = {stride(codes.head_bytes, sizes[1]), stride(codes.token_bytes, sizes[2]),
                                 stride(codes.page_bytes, sizes[3])};
  const cuuint32_t box_sizes[4] = {static_cast<cuuint32_t>(instance.box_columns), 1, static_cast<cuuint32_t>(box_rows), 1},
                   steps[4] = {1, 1, 1, 1};
  // Bits are copied as they are: as integers, so that no NaN is touched.
  const auto type =
      instance.box_row_bytes == instance.box_columns ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  const auto permutation = instance.box_row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
  return encode(&map, type, 4, const_cast<char*>(codes.data), sizes, strides, box_sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                permutation, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace quantattn::cuda
