#pragma once

#include <array>

#include "prefill/instances.h"
#include "prefill/kernel.cuh"

// The prefill kernels of one pair of formats. A new shape of block is one line here.
namespace quantattn::cuda {

template <class KFormat, class VFormat>
struct PrefillInstances {
  template <int kHeadDim, BlockSize kBlockSize>
  static constexpr PrefillInstance instance() {
    using Shape = PrefillShape<KFormat, VFormat, kHeadDim, kBlockSize>;
    return {kHeadDim, Shape::kBlockRows, Shape::kThreads, Shape::kSharedBytes, &prefill_kernel<KFormat, VFormat, Shape>};
  }

  static constexpr std::array kInstances = {
      instance<64, BlockSize::kLarge>(),  instance<128, BlockSize::kLarge>(), instance<128, BlockSize::kSmall>(),
      instance<256, BlockSize::kLarge>(), instance<256, BlockSize::kSmall>(),
  };
};

template <class KFormat, class VFormat>
PairPrefill make_pair_prefill(KvPair pair) {
  return {pair, PrefillInstances<KFormat, VFormat>::kInstances};
}

}  // namespace quantattn::cuda
