#include <vector>

#include "decode/instances.h"

namespace quantattn::cuda {

// generated/cuda_pairs.def has one row QATTN_CUDA_PAIR(table) for each pair of formats.
#define QATTN_CUDA_PAIR(table) const PairKernels& table();
#include "generated/cuda_pairs.def"
#undef QATTN_CUDA_PAIR

std::span<const PairKernels* const> all_pairs() {
  static const std::vector<const PairKernels*> pairs = {
#define QATTN_CUDA_PAIR(table) &table(),
#include "generated/cuda_pairs.def"
#undef QATTN_CUDA_PAIR
  };
  return pairs;
}

}  // namespace quantattn::cuda
