#pragma once

#include <optional>

#include "problem.h"
#include "reference.h"

namespace quantattn_test {

// A ragged batch with poisoned gaps: NaN lies wherever nothing may be read.
struct RaggedShape {
  std::vector<int32_t> num_q_tokens = {40, 0, 3, 1}, num_keys = {40, 7, 70, 0};
  quantattn::DType dtype = quantattn::DType::kFloat32;
  quantattn::KvPair format = {quantattn::KvFormat::kInt8, quantattn::KvFormat::kInt8};  // of a cache
  quantattn::ScaleGranularity granularity = quantattn::ScaleGranularity::kTokenHead;
  int num_kv_heads = 2, group = 2, head_dim = 64, page_size = 16;
  int sliding_window = 0;
  float logits_soft_cap = 0.f;
  bool causal = true, has_alibi = false, has_sinks = false, has_starts = false;
  bool has_offset = false;  // of a cache
  uint32_t seed = 1;
};
std::string describe(const RaggedShape& shape);
// Every property drawn at random.
RaggedShape random_ragged_shape(uint32_t seed);

// Queries, outputs and what prefill and hybrid calls share.
class RaggedProblem {
 public:
  explicit RaggedProblem(const RaggedShape& shape);
  RaggedProblem(const RaggedProblem&) = delete;
  RaggedProblem& operator=(const RaggedProblem&) = delete;

  // What the last run wrote: bytes of out, gaps included, then lse.
  std::vector<uint8_t> out_bytes;
  std::vector<float> lse;
  void clear_outputs();

  // Calls visit(array) for the arrays that a call writes.
  template <class Visit>
  void for_each_output(const Visit& visit) {
    visit(out_bytes), visit(lse);
  }

 protected:
  template <class Params>
  void fill(Params* params);
  template <class Visit>
  void for_each_common_array(const Visit& visit) {
    visit(q_), visit(alibi_slopes_), visit(sinks_), visit(cu_seqlens_q_), visit(seq_starts_);
    for_each_output(visit);
  }
  void compare(const ReferenceResult& expected, const quantattn::VectorArray& out, double tolerance,
               std::string_view variant) const;

  RaggedShape shape_;
  int64_t num_tokens_ = 0;
  std::optional<ReferenceResult> expected_;

 private:
  std::vector<uint8_t> q_;
  std::vector<float> alibi_slopes_, sinks_;
  std::vector<int32_t> cu_seqlens_q_, seq_starts_;
};

class PrefillProblem : public RaggedProblem {
 public:
  explicit PrefillProblem(const RaggedShape& shape);
  quantattn::PrefillPlan run(const quantattn::Execution& execution = {});
  // Runs and compares with the float64 reference, which the first check computes.
  void check(const quantattn::Execution& execution = {});
  // Compares what out_bytes and lse hold.
  void check_result(double tolerance, std::string_view ran);

  // Calls visit(array) for every array that `params` refers to.
  template <class Visit>
  void for_each_array(const Visit& visit) {
    visit(k_), visit(v_), visit(cu_seqlens_k_);
    for_each_common_array(visit);
  }

  quantattn::PrefillParams params;

 private:
  std::vector<uint8_t> k_, v_;
  std::vector<int32_t> cu_seqlens_k_;
};

class HybridProblem : public RaggedProblem {
 public:
  explicit HybridProblem(const RaggedShape& shape);
  quantattn::HybridPlan run(const quantattn::Execution& execution = {});
  // Another call over the same storage, whose outputs are not cleared.
  void run_params(const quantattn::HybridParams& other, const quantattn::Execution& execution);
  void check(const quantattn::Execution& execution = {});
  void check_result(double tolerance, std::string_view ran);

  template <class Visit>
  void for_each_array(const Visit& visit) {
    cache_.for_each_cache_array(visit);
    for_each_common_array(visit);
  }

  quantattn::HybridParams params;

 private:
  Problem cache_;
};

}  // namespace quantattn_test
