#pragma once

#include <array>

#include "append/kernel.cuh"
#include "decode/cuda_core_engine.cuh"
#include "decode/instances.h"
#include "decode/kernel.cuh"
#include "decode/policy.h"
#include "decode/tensor_core_engine.cuh"

// The kernels of one pair of formats. A new head_dim or row tile is one line here.
namespace quantattn::cuda {

template <class KFormat, class VFormat>
struct PairInstances {
  template <int kHeadDim>
  static constexpr int kStages = num_stages(TilePipeline<KFormat, VFormat, kHeadDim, 2>::kStageBytes);

  template <int kHeadDim, int kColumns>
  static constexpr DecodeInstance tensor_cores() {
    using Pipeline = TilePipeline<KFormat, VFormat, kHeadDim, kStages<kHeadDim>>;
    using Engine = TensorCoreEngine<KFormat, VFormat, kHeadDim, kColumns>;
    constexpr int kMinBlocks = min_blocks_tensor_cores(kHeadDim, kColumns);
    return {kHeadDim, Engine::kRows, KernelLayout<Engine, Pipeline>::kBytesPerWarp, &decode_kernel<Engine, Pipeline, kMinBlocks>};
  }

  template <int kHeadDim, int kRows>
  static constexpr DecodeInstance cuda_cores() {
    using Pipeline = TilePipeline<KFormat, VFormat, kHeadDim, kStages<kHeadDim>>;
    using Engine = CudaCoreEngine<KFormat, VFormat, kHeadDim, kRows>;
    constexpr int kMinBlocks = min_blocks_cuda_cores(kHeadDim, kRows);
    return {kHeadDim, Engine::kRows, KernelLayout<Engine, Pipeline>::kBytesPerWarp, &decode_kernel<Engine, Pipeline, kMinBlocks>};
  }

  static constexpr std::array kTensorCoreInstances = {
      tensor_cores<64, 1>(),  tensor_cores<64, 2>(),  tensor_cores<64, 4>(),  tensor_cores<128, 1>(),
      tensor_cores<128, 2>(), tensor_cores<128, 4>(), tensor_cores<256, 1>(), tensor_cores<256, 2>(),
  };
  static constexpr std::array kCudaCoreInstances = {
      cuda_cores<64, 1>(),  cuda_cores<64, 4>(),  cuda_cores<128, 1>(),
      cuda_cores<128, 4>(), cuda_cores<256, 1>(), cuda_cores<256, 4>(),
  };
};

template <class KFormat, class VFormat>
PairKernels make_pair_kernels(KvPair pair) {
  using Instances = PairInstances<KFormat, VFormat>;
  return {pair, Instances::kTensorCoreInstances, Instances::kCudaCoreInstances, &append_kernel<KFormat, VFormat>};
}

}  // namespace quantattn::cuda
