#pragma once

#include "quantattn/kv_cache.h"

// Where vectors lie in memory, as kernels are told.
namespace quantattn::cuda {

// Where vectors of codes lie, in bytes.
struct CodeAddresses {
  const char* data;
  int64_t page_bytes, token_bytes, head_bytes;
  int row_bytes;
  int copy_bytes;  // the widest asynchronous copy that pointer and strides allow: 16 or 8; 0: element by element
};

// Whether every vector, and its length, is a multiple of `bytes`.
inline bool all_multiples(const VectorArray& array, int element_bytes, int head_dim, int bytes) {
  const int64_t strides = array.outer_stride | array.token_stride | array.head_stride | head_dim;
  return (reinterpret_cast<uintptr_t>(array.data) | static_cast<uint64_t>(strides * element_bytes)) %
             static_cast<unsigned>(bytes) ==
         0;
}

inline CodeAddresses code_addresses(const VectorArray& codes, KvFormat format, int head_dim) {
  const int bytes = code_bytes(format);
  CodeAddresses addresses = {static_cast<const char*>(codes.data),
                             codes.outer_stride * bytes,
                             codes.token_stride * bytes,
                             codes.head_stride * bytes,
                             head_dim * bytes,
                             0};
  for (int copy_bytes : {8, 16})
    if (all_multiples(codes, bytes, head_dim, copy_bytes)) addresses.copy_bytes = copy_bytes;
  return addresses;
}

}  // namespace quantattn::cuda
