#pragma once

#include <span>

#include "core/backend.h"
#include "decode/task.h"

namespace quantattn::cuda {

// Kernel families. Hopper's is for prompts alone; tensor_cores computes prompts on every GPU.
inline constexpr std::string_view kTensorCores = "tensor_cores", kCudaCores = "cuda_cores", kHopper = "hopper";

// One compiled decoding kernel.
struct DecodeInstance {
  int head_dim;        // padded
  int rows;            // of a row tile
  int max_warps;       // of a block
  int bytes_per_warp;  // shared memory
  void (*entry)(UniformTask);
  void (*ragged_entry)(RaggedTask);
};

// Everything compiled for one pair of formats. Instances are sorted by head_dim, then rows.
struct PairKernels {
  KvPair format;
  std::span<const DecodeInstance> tensor_cores, cuda_cores;
  void (*append)(AppendParams);  // the kernel of append_kv
};

std::span<const PairKernels* const> all_pairs();

std::span<const DecodeKernel> decode_kernels();

DecodePlan plan_decode(const DecodeParams& params, const Execution& execution, std::span<const DecodeKernel* const> candidates);
void run_decode(const DecodeParams& params, const Execution& execution, const DecodePlan& plan, Workspace workspace);

}  // namespace quantattn::cuda
