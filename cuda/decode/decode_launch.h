#pragma once

#include "decode/instances.h"

// What decode_attention and hybrid_attention have in common on the host: from a chosen kernel and cut of the work to its
// launch.
namespace quantattn::cuda {

// How many blocks of an instance a multiprocessor holds, and how many warps a block has.
struct Residency {
  int warps_per_block, blocks_per_multiprocessor;
};
Residency residency(const DecodeInstance& instance, int device, std::string_view who);

struct DecodeLaunch {
  const DecodeInstance* instance;
  int num_rows;         // of a sequence; in a ragged batch of each, for the cut of equal lengths
  int columns_divisor;  // row tiles of a sequence; of a ragged batch: KV heads
  int columns_per_block, items_per_sequence;
  WorkSplit split;
  int even_units, max_parts, min_part_tiles;
  int num_blocks, warps_per_block;
  int num_units;         // at most, of the whole grid
  int num_shared_units;  // those that may have to join what they leave with others: counters and pieces are for these
};

// Of a decode_attention call.
DecodeLaunch plan_launch(const DecodeParams& params, const Execution& execution, std::string_view variant);

// Fills in what an instance and a device decide. Returns the number of blocks that the device holds.
int set_instance(DecodeLaunch& launch, const DecodeInstance& instance, const Execution& execution, std::string_view who);

// For sequences that turn out to be equally long, with `num_items` items in all.
void prepare_even_cut(DecodeLaunch& launch, int64_t num_items, int num_blocks);

int64_t workspace_bytes(const DecodeLaunch& launch);
int64_t counter_bytes(const DecodeLaunch& launch);

// Of a batch in which every sequence has params.num_q_tokens query tokens.
DecodeTask make_task(const DecodeParams& params, const DecodeLaunch& launch, Workspace workspace);

void run(const DecodeLaunch& launch, const DecodeTask& task, const Execution& execution, std::string_view who);

const PairKernels& kernels_of(KvPair format);

// The variant that the environment asks for where the call does not, if the operation has it; empty: none. Throws Unsupported
// where no operation has it.
std::string_view variant_from_environment(const Execution& execution, std::string_view who,
                                          std::initializer_list<std::string_view> variants);
inline constexpr std::initializer_list<std::string_view> kDecodeVariants = {kTensorCores, kCudaCores};

constexpr int64_t ceil_divide(int64_t n, int64_t d) { return (n + d - 1) / d; }

}  // namespace quantattn::cuda
