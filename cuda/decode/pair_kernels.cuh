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
  template <class Uniform, class Ragged, int kRegisterWarps>
  static constexpr DecodeInstance instance() {
    using Pipeline = TilePipeline<UniformTask, KFormat, VFormat, Uniform::kHeadDim, Uniform::kRows>;
    using RaggedPipeline = TilePipeline<RaggedTask, KFormat, VFormat, Uniform::kHeadDim, Uniform::kRows>;
    constexpr int kBytesPerWarp = KernelLayout<Uniform, Pipeline>::kBytesPerWarp,
                  kWarps = block_warps(kRegisterWarps, kBytesPerWarp);
    return {Uniform::kHeadDim,
            Uniform::kRows,
            kWarps,
            kBytesPerWarp,
            &decode_kernel<Uniform, Pipeline, kWarps, UniformTask>,
            &decode_kernel<Ragged, RaggedPipeline, kWarps, RaggedTask>};
  }

  template <int kHeadDim, int kColumns>
  static constexpr DecodeInstance tensor_cores() {
    return instance<TensorCoreEngine<UniformTask, KFormat, VFormat, kHeadDim, kColumns>,
                    TensorCoreEngine<RaggedTask, KFormat, VFormat, kHeadDim, kColumns>,
                    register_warps_tensor_cores(kHeadDim, kColumns)>();
  }

  template <int kHeadDim, int kRows>
  static constexpr DecodeInstance cuda_cores() {
    return instance<CudaCoreEngine<UniformTask, KFormat, VFormat, kHeadDim, kRows>,
                    CudaCoreEngine<RaggedTask, KFormat, VFormat, kHeadDim, kRows>,
                    register_warps_cuda_cores(kHeadDim, kRows)>();
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
