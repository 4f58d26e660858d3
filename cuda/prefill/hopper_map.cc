#include "prefill/hopper_map.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <numeric>

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

// Tokens of a box: a box lies in one page and holds groups of eight rows. 0 where a key tile cannot be made of such boxes.
int choose_box_rows(const PrefillTask& task, int tile_keys) {
  const int rows = task.page_table ? std::gcd(static_cast<int>(task.page_size.divisor), tile_keys) : tile_keys;
  return rows % 8 == 0 ? rows : 0;
}

// Whether boxes can hold all channels of their tokens, in the order of operands. The copy engine does not cut such a box off
// where its page or its head ends, so both have to end with a box.
bool can_hold_rows(const PrefillTask& task, const CodeAddresses& codes, const HopperInstance& instance) {
  return task.page_table && task.head_dim == instance.head_dim && instance.box_row_bytes == 2 * instance.box_columns &&
         codes.head_bytes % instance.box_row_bytes == 0;
}

// What the copy engine has to know.
struct BoxedTensor {
  cuuint64_t sizes[5], strides[4];  // strides in bytes, of all axes but the first
  cuuint32_t box[5];
};

cuuint64_t size(int64_t n) { return static_cast<cuuint64_t>(std::max<int64_t>(n, 1)); }

// The stride of an axis of one element does not matter and may be anything.
cuuint64_t stride(int64_t bytes, cuuint64_t n) { return static_cast<cuuint64_t>(n == 1 && bytes % 16 != 0 ? 16 : bytes); }

int64_t num_kv_heads(const PrefillTask& task) { return task.num_q_heads / static_cast<int>(task.group_size.divisor); }

// Axes: channel, token in page, head, -, page. A box is one block of channels of some tokens.
BoxedTensor blocks_of_channels(const PrefillTask& task, const CodeAddresses& codes, const HopperInstance& instance, int rows) {
  const cuuint64_t tokens = size(task.cu_seqlens_k ? task.num_k_tokens : task.page_size.divisor),
                   heads = size(num_kv_heads(task)), pages = size(task.num_pages);
  return {{size(task.head_dim), tokens, heads, 1, pages},
          {stride(codes.token_bytes, tokens), stride(codes.head_bytes, heads), 16, stride(codes.page_bytes, pages)},
          {static_cast<cuuint32_t>(instance.box_columns), static_cast<cuuint32_t>(rows), 1, 1, 1}};
}

// Axes: channel in block, token in page, block of channels in all heads, eight tokens from there, page. A box is groups of
// eight tokens, and a group all blocks of a head.
BoxedTensor whole_rows(const PrefillTask& task, const CodeAddresses& codes, const HopperInstance& instance, int rows) {
  const int64_t blocks = task.head_dim / instance.box_columns,
                head_blocks = codes.head_bytes / instance.box_row_bytes * (num_kv_heads(task) - 1);
  const cuuint64_t groups = size(rows / 8), pages = size(task.num_pages);
  return {
      {static_cast<cuuint64_t>(instance.box_columns), size(task.page_size.divisor), size(head_blocks + blocks), groups, pages},
      {stride(codes.token_bytes, 8), static_cast<cuuint64_t>(instance.box_row_bytes), stride(8 * codes.token_bytes, groups),
       stride(codes.page_bytes, pages)},
      {static_cast<cuuint32_t>(instance.box_columns), 8, static_cast<cuuint32_t>(blocks), static_cast<cuuint32_t>(groups), 1}};
}

bool encode_map(CUtensorMap& map, const CodeAddresses& codes, const HopperInstance& instance, const BoxedTensor& tensor) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return false;
  // Bits are copied as they are: as integers, so that no NaN is touched.
  const auto type =
      instance.box_row_bytes == instance.box_columns ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  const auto permutation = instance.box_row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  return encode(&map, type, 5, const_cast<char*>(codes.data), tensor.sizes, tensor.strides, tensor.box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, permutation, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

bool plan_copies(HopperTask& task, const HopperInstance& instance) {
  const PrefillTask& prefill = task.prefill;
  const int rows = choose_box_rows(prefill, instance.tile_keys);
  if (rows == 0) return false;
  const auto row_bytes = static_cast<uint32_t>(instance.box_row_bytes),
             blocks = static_cast<uint32_t>(instance.head_dim / instance.box_columns);
  const bool are_whole = can_hold_rows(prefill, prefill.k, instance) && can_hold_rows(prefill, prefill.v, instance);
  const auto log2 = [](uint32_t x) { return std::countr_zero(x); };
  const auto plan = [&](CUtensorMap& map, int& head_step, const CodeAddresses& codes) {
    head_step = are_whole ? static_cast<int>(codes.head_bytes / instance.box_row_bytes) : 1;
    return encode_map(map, codes, instance, (are_whole ? whole_rows : blocks_of_channels)(prefill, codes, instance, rows));
  };
  task.boxes = {log2(static_cast<uint32_t>(rows)), are_whole ? 0 : log2(blocks),
                are_whole ? AtomStrides{row_bytes / 2, blocks * row_bytes / 2}
                          : AtomStrides{static_cast<uint32_t>(instance.tile_keys) * row_bytes / 16, row_bytes / 2}};
  return plan(task.k_map, task.k_head_step, prefill.k) && plan(task.v_map, task.v_head_step, prefill.v);
}

}  // namespace quantattn::cuda
