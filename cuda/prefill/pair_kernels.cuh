#pragma once

#include <array>

#include "prefill/instances.h"
#include "prefill/kernel.cuh"

// The prefill kernels of one pair of formats. A new head_dim is one line here.
namespace quantattn::cuda {

template <class KFormat, class VFormat>
struct PrefillInstances {
  template <int kHeadDim>
  static constexpr PrefillInstance instance() {
    using Shape = PrefillShape<KFormat, VFormat, kHeadDim>;
    return {kHeadDim, Shape::kBlockRows, Shape::kThreads, Shape::kSharedBytes, &prefill_kernel<KFormat, VFormat, kHeadDim>};
  }

  static constexpr std::array kInstances = {instance<64>(), instance<128>(), instance<256>()};
};

template <class KFormat, class VFormat>
PairPrefill make_pair_prefill(KvPair pair) {
  return {pair, PrefillInstances<KFormat, VFormat>::kInstances};
}

}  // namespace quantattn::cuda
