#include "ragged_problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "check.h"

namespace quantattn_test {

using namespace quantattn;

namespace {

constexpr int64_t kGap = 8;  // poisoned elements between vectors

// About uniform in [-size, size), as `dtype`.
void append_number(DType dtype, float size, uint32_t& state, std::vector<uint8_t>& bytes) {
  const float x = size * uniform(state);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (dtype == DType::kBFloat16) bits >>= 16;
  if (dtype == DType::kFloat16) {  // sign, an exponent of at least -14 and the upper ten bits of the mantissa
    const uint32_t exponent = bits >> 23 & 255u;
    bits = exponent < 113 ? 0u : (bits >> 16 & 0x8000u) | (exponent - 112) << 10 | (bits >> 13 & 0x3FFu);
  }
  const auto* first = reinterpret_cast<const uint8_t*>(&bits);
  bytes.insert(bytes.end(), first, first + bytes_of(dtype));
}

// [tokens, heads, head_dim] with gaps of NaN, as `dtype`.
std::vector<uint8_t> random_vectors(DType dtype, int64_t tokens, int64_t heads, int64_t head_dim, float size, uint32_t seed) {
  std::vector<uint8_t> bytes;
  for (int64_t row = 0; row < tokens * heads; ++row) {
    for (int64_t d = 0; d < head_dim; ++d) append_number(dtype, size, seed, bytes);
    bytes.insert(bytes.end(), static_cast<size_t>(kGap * bytes_of(dtype)), uint8_t{0xFF});
  }
  return bytes;
}

VectorArray layout_of(void* data, int64_t heads, int64_t head_dim) {
  return {data, 0, heads * (head_dim + kGap), head_dim + kGap};
}

std::vector<int32_t> cumulative(const std::vector<int32_t>& counts) {
  std::vector<int32_t> sums = {0};
  for (int32_t count : counts) sums.push_back(sums.back() + count);
  return sums;
}

Shape cache_shape(const RaggedShape& s) {
  Shape shape;
  shape.format = s.format;
  shape.granularity = s.granularity;
  shape.seq_lens = s.num_keys;
  shape.num_kv_heads = s.num_kv_heads;
  shape.group = s.group;
  shape.head_dim = s.head_dim;
  shape.page_size = s.page_size;
  shape.has_offset = s.has_offset;
  shape.seed = s.seed;
  return shape;
}

// Calls run(scratch) with exactly as many bytes as promised, so that a sanitizer sees the first one too many; NaN, so that
// reading one shows.
template <class Run>
void run_with_scratch(int64_t bytes, const Run& run) {
  constexpr size_t kAlignment = 256;
  const auto size = static_cast<size_t>(bytes);
  const std::unique_ptr<void, void (*)(void*)> scratch(
      std::aligned_alloc(kAlignment, (size + kAlignment) / kAlignment * kAlignment), std::free);
  std::fill_n(static_cast<uint8_t*>(scratch.get()), size, uint8_t{0xFF});
  run(scratch.get());
}

double rounding_of(DType dtype) { return dtype == DType::kFloat32 ? 0.0 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8; }

}  // namespace

std::string describe(const RaggedShape& s) {
  std::string lens;
  for (size_t b = 0; b < s.num_keys.size(); ++b)
    lens.append(1, ' ').append(std::to_string(s.num_q_tokens[b])).append(1, '/').append(std::to_string(s.num_keys[b]));
  return text(name(s.dtype), " over ", name(s.format), " scales ", static_cast<int>(s.granularity), " n/L", lens, " Hkv ",
              s.num_kv_heads, " group ", s.group, " D ", s.head_dim, " page ", s.page_size, " causal ", s.causal, " window ",
              s.sliding_window, " cap ", s.logits_soft_cap, " alibi ", s.has_alibi, " sinks ", s.has_sinks, " starts ",
              s.has_starts, " offset ", s.has_offset, " seed ", s.seed);
}

RaggedShape random_ragged_shape(uint32_t seed) {
  uint32_t state = seed * 2654435761u + 12345u;
  const auto below = [&state](int limit) {
    return static_cast<int>((static_cast<double>(uniform(state)) + 1.0) / 2.0 * limit) % limit;
  };
  const auto pick = [&below](const std::vector<int>& choices) {
    return choices[static_cast<size_t>(below(static_cast<int>(choices.size())))];
  };
  RaggedShape shape;
  shape.num_q_tokens.clear();
  shape.num_keys.clear();
  for (int b = below(4); b >= 0; --b) {
    shape.num_q_tokens.push_back(pick({0, 1, 2 + below(15), 17 + below(20), 40 + below(80)}));
    shape.num_keys.push_back(pick({0, 1 + below(10), 10 + below(60), shape.num_q_tokens.back() + below(80)}));
  }
  shape.dtype = static_cast<DType>(below(3));
  shape.format = kv_pairs()[static_cast<size_t>(below(static_cast<int>(kv_pairs().size())))];
  shape.granularity = pick({0, 1}) ? ScaleGranularity::kTokenHead : ScaleGranularity::kHead;
  shape.num_kv_heads = 1 + below(3);
  shape.group = pick({1, 2, 3, 4, 7, 16});
  shape.head_dim = 8 * (4 + below(13));
  shape.page_size = pick({1, 3, 16, 64, 256});
  shape.sliding_window = pick({0, 0, 1 + below(70)});
  shape.logits_soft_cap = static_cast<float>(pick({0, 0, 5}));
  shape.causal = pick({0, 1, 1}) != 0;
  shape.has_alibi = below(2) != 0;
  shape.has_sinks = below(2) != 0;
  shape.has_starts = below(3) == 0;
  shape.seed = seed;
  return shape;
}

RaggedProblem::RaggedProblem(const RaggedShape& shape) : shape_(shape), cu_seqlens_q_(cumulative(shape.num_q_tokens)) {
  const int num_q_heads = shape.num_kv_heads * shape.group;
  num_tokens_ = cu_seqlens_q_.back();
  q_ = random_vectors(shape.dtype, num_tokens_, num_q_heads, shape.head_dim, 2.f, shape.seed);
  out_bytes.resize(q_.size());
  lse.resize(static_cast<size_t>(num_tokens_ * num_q_heads));
  for (int h = 0; h < num_q_heads; ++h) {
    alibi_slopes_.push_back(0.02f * static_cast<float>(h + 1));
    sinks_.push_back(0.3f * static_cast<float>(h) - 1.f);
  }
  for (int32_t length : shape.num_keys) seq_starts_.push_back(length / 3);
}

template <class Params>
void RaggedProblem::fill(Params* params) {
  const int num_q_heads = shape_.num_kv_heads * shape_.group;
  params->q = layout_of(q_.data(), num_q_heads, shape_.head_dim);
  params->out = layout_of(out_bytes.data(), num_q_heads, shape_.head_dim);
  params->lse = lse.data();
  params->batch_size = static_cast<int>(shape_.num_q_tokens.size());
  params->num_q_heads = num_q_heads;
  params->num_q_tokens = num_tokens_;
  params->cu_seqlens_q = {cu_seqlens_q_.data()};
  params->causal = shape_.causal;
  params->sm_scale = 1.f / std::sqrt(static_cast<float>(shape_.head_dim));
  params->sliding_window = shape_.sliding_window;
  params->logits_soft_cap = shape_.logits_soft_cap;
  if (shape_.has_alibi) params->alibi_slopes = {alibi_slopes_.data()};
  if (shape_.has_sinks) params->sinks = {sinks_.data()};
  if (shape_.has_starts) params->seq_starts = {seq_starts_.data()};
}

void RaggedProblem::clear_outputs() {
  std::fill(out_bytes.begin(), out_bytes.end(), uint8_t{0xFF});
  std::fill(lse.begin(), lse.end(), NAN);
}

void RaggedProblem::compare(const ReferenceResult& expected, const VectorArray& out, double tolerance,
                            std::string_view variant) const {
  const int num_q_heads = shape_.num_kv_heads * shape_.group;
  double error = 0, norm = 0, lse_error = 0;
  bool gaps_are_intact = true;
  for (int64_t row = 0; row < num_tokens_ * num_q_heads; ++row) {
    const int64_t start = out.offset(0, row / num_q_heads, row % num_q_heads);
    for (int64_t d = 0; d < shape_.head_dim; ++d) {
      const double wanted = expected.out[static_cast<size_t>(row * shape_.head_dim + d)];
      const double difference = decode_number(shape_.dtype, out.data, start + d) - wanted;
      error += difference * difference;
      norm += wanted * wanted;
    }
    const int64_t bytes = bytes_of(shape_.dtype);
    for (int64_t i = (start + shape_.head_dim) * bytes; i < (start + shape_.head_dim + kGap) * bytes; ++i)
      gaps_are_intact = gaps_are_intact && out_bytes[static_cast<size_t>(i)] == 0xFF;
    const double got = static_cast<double>(lse[static_cast<size_t>(row)]), wanted = expected.lse[static_cast<size_t>(row)];
    if (got != wanted) lse_error = std::max(lse_error, std::isnan(got) ? INFINITY : std::abs(got - wanted));
  }
  const double relative = std::sqrt(error / std::max(norm, 1e-30));
  CHECK(error == 0 || relative <= tolerance + rounding_of(shape_.dtype), relative, " on ", variant, ", ", describe(shape_));
  CHECK(lse_error <= 2 * tolerance, lse_error, " in lse on ", variant, ", ", describe(shape_));
  CHECK(gaps_are_intact, "out between the vectors was written on ", variant, ", ", describe(shape_));
}

PrefillProblem::PrefillProblem(const RaggedShape& shape) : RaggedProblem(shape), cu_seqlens_k_(cumulative(shape.num_keys)) {
  fill(&params);
  const int64_t num_keys = cu_seqlens_k_.back();
  k_ = random_vectors(shape.dtype, num_keys, shape.num_kv_heads, shape.head_dim, 1.5f, shape.seed + 1);
  v_ = random_vectors(shape.dtype, num_keys, shape.num_kv_heads, shape.head_dim, 4.f, shape.seed + 2);
  params.k = layout_of(k_.data(), shape.num_kv_heads, shape.head_dim);
  params.v = layout_of(v_.data(), shape.num_kv_heads, shape.head_dim);
  params.dtype = shape.dtype;
  params.num_kv_heads = shape.num_kv_heads;
  params.head_dim = shape.head_dim;
  params.num_k_tokens = num_keys;
  params.cu_seqlens_k = {cu_seqlens_k_.data()};
}

PrefillPlan PrefillProblem::run(const Execution& execution) {
  const PrefillPlan plan = plan_prefill_attention(params, execution);
  clear_outputs();
  run_with_scratch(plan.workspace_bytes, [&](void* scratch) { prefill_attention(params, execution, plan, scratch); });
  return plan;
}

void PrefillProblem::check(const Execution& execution) {
  const PrefillPlan plan = run(execution);
  CHECK(execution.kernel.empty() || plan.variant == execution.kernel, "forced ", execution.kernel, ", ran ", plan.variant);
  check_result(2e-6, plan.variant);
}

void PrefillProblem::check_result(double tolerance, std::string_view ran) {
  if (!expected_) expected_ = reference_prefill(params);
  compare(*expected_, params.out, tolerance, ran);
}

HybridProblem::HybridProblem(const RaggedShape& shape) : RaggedProblem(shape), cache_(cache_shape(shape)) {
  fill(&params);
  params.q_dtype = shape.dtype;
  params.cache = cache_.params.cache;
  params.page_table = cache_.params.page_table;
  params.max_pages = cache_.params.max_pages;
  params.seq_lens = cache_.params.seq_lens;
}

HybridPlan HybridProblem::run(const Execution& execution) {
  clear_outputs();
  run_params(params, execution);
  return plan_hybrid_attention(params, execution);
}

void HybridProblem::run_params(const HybridParams& other, const Execution& execution) {
  const HybridPlan plan = plan_hybrid_attention(other, execution);
  run_with_scratch(plan.workspace_bytes, [&](void* scratch) { hybrid_attention(other, execution, plan, {scratch, nullptr}); });
}

void HybridProblem::check(const Execution& execution) {
  const HybridPlan plan = run(execution);
  CHECK(execution.kernel.empty() || plan.variant == execution.kernel, "forced ", execution.kernel, ", ran ", plan.variant);
  const bool is_8bit = info(shape_.format.k).has_scale || info(shape_.format.v).has_scale;
  check_result(is_8bit ? 1e-3 : 1e-5, plan.variant);
}

void HybridProblem::check_result(double tolerance, std::string_view ran) {
  if (!expected_) expected_ = reference_hybrid(params);
  compare(*expected_, params.out, tolerance, ran);
}

}  // namespace quantattn_test
