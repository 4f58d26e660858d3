#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "quantattn/quantattn.h"

namespace quantattn_test {

// A decoding problem with paged, poisoned storage, filled through append_kv.
struct Shape {
  quantattn::KvPair format = {quantattn::KvFormat::kInt8, quantattn::KvFormat::kInt8};
  quantattn::ScaleGranularity granularity = quantattn::ScaleGranularity::kTokenHead;
  std::vector<int32_t> seq_lens = {37, 0, 130};
  int num_q_tokens = 1, num_kv_heads = 2, group = 2, head_dim = 64, page_size = 16;
  int sliding_window = 0;
  float logits_soft_cap = 0.f;
  bool has_alibi = false, has_sinks = false, has_starts = false, has_offset = false;
  uint32_t seed = 1;
};
std::string describe(const Shape& shape);

class Problem {
 public:
  explicit Problem(const Shape& shape);
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  // Runs into `out` and `lse`, with exactly the workspace that the plan asks for.
  quantattn::DecodePlan run(const quantattn::Execution& execution = {});
  // Runs and compares with the float64 reference.
  void check(const quantattn::Execution& execution = {});
  // Compares what `out` and `lse` hold.
  void check_result(double tolerance, std::string_view ran) const;
  void clear_outputs();

  // Calls visit(array) for every array that `params` refers to; or for those that a call writes.
  template <class Visit>
  void for_each_array(const Visit& visit) {
    visit(q_), visit(alibi_slopes_), visit(sinks_), visit(seq_starts_);
    for_each_cache_array(visit);
    for_each_output(visit);
  }
  template <class Visit>
  void for_each_cache_array(const Visit& visit) {
    visit(k_codes_), visit(v_codes_), visit(k_scale_), visit(v_scale_), visit(k_static_), visit(v_static_), visit(k_offset_);
    visit(page_table_), visit(seq_lens_);
  }
  template <class Visit>
  void for_each_output(const Visit& visit) {
    visit(out), visit(lse);
  }

  quantattn::DecodeParams params;
  std::vector<float> out, lse;

 private:
  void make_cache(const Shape& shape);
  void fill_cache(const Shape& shape);
  quantattn::ScaleView make_scale(const Shape& shape, bool has_scale, float size, std::vector<uint16_t>& halves,
                                  std::vector<float>& floats);

  Shape shape_;
  std::vector<float> q_, alibi_slopes_, sinks_, k_static_, v_static_, k_offset_;
  std::vector<uint8_t> k_codes_, v_codes_;
  std::vector<uint16_t> k_scale_, v_scale_;
  std::vector<int32_t> seq_lens_, seq_starts_, page_table_;
};

// The CPU variants that run on this machine.
std::vector<std::string> cpu_variants();
// Uniform in [-1, 1), the same on every platform.
float uniform(uint32_t& state);

}  // namespace quantattn_test
