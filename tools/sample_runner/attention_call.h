#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "cache.h"
#include "device_memory.h"
#include "fresh_kv.h"
#include "options.h"
#include "problem.h"

namespace sample_runner {

// What the library planned for a call.
struct PlanFacts {
  std::string backend, variant;
  std::optional<int> num_splits, split_size;  // none: fresh K and V are not split
  int64_t workspace_bytes = 0;
};

// One planned call of the library over some sequences of a problem, with its tensors on a device.
class AttentionCall {
 public:
  AttentionCall() = default;
  AttentionCall(const AttentionCall&) = delete;
  AttentionCall& operator=(const AttentionCall&) = delete;
  virtual ~AttentionCall() = default;

  virtual void run() const = 0;
  virtual const PlanFacts& plan() const = 0;
  virtual const Buffer& out() const = 0;  // [T, Hq, D] of these sequences
  virtual const Buffer& lse() const = 0;  // [T, Hq]
};

// `sequences` in ascending order. To decode, all must have as many query tokens.
std::unique_ptr<AttentionCall> plan_decode(const Problem& problem, const Cache& cache, std::span<const int> sequences,
                                           const Options& options, DeviceMemory& memory);
std::unique_ptr<AttentionCall> plan_hybrid(const Problem& problem, const Cache& cache, std::span<const int> sequences,
                                           const Options& options, DeviceMemory& memory);
// The whole batch.
std::unique_ptr<AttentionCall> plan_prefill(const Problem& problem, const FreshKv& kv, const Options& options,
                                            DeviceMemory& memory);

std::vector<int> all_sequences(const Problem& problem);

}  // namespace sample_runner
