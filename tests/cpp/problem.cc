#include "problem.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "check.h"
#include "reference.h"

namespace quantattn_test {

using namespace quantattn;

float uniform(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
}

std::vector<std::string> cpu_variants() {
  std::vector<std::string> names;
  for (const KernelInfo& row : built_decode_kernels())
    if (row.backend == "cpu" && row.runs_here && std::find(names.begin(), names.end(), row.variant) == names.end())
      names.emplace_back(row.variant);
  return names;
}

std::string describe(const Shape& s) {
  std::string lens;
  for (int32_t length : s.seq_lens) lens.append(1, ' ').append(std::to_string(length));
  return text(name(s.format), " scales ", static_cast<int>(s.granularity), " lens", lens, " n ", s.num_q_tokens, " Hkv ",
              s.num_kv_heads, " group ", s.group, " D ", s.head_dim, " page ", s.page_size, " window ", s.sliding_window,
              " cap ", s.logits_soft_cap, " alibi ", s.has_alibi, " sinks ", s.has_sinks, " starts ", s.has_starts, " offset ",
              s.has_offset);
}

Problem::Problem(const Shape& shape) : shape_(shape) {
  uint32_t state = shape.seed;
  const int num_q_heads = shape.num_kv_heads * shape.group, batch_size = static_cast<int>(shape.seq_lens.size());
  const size_t num_rows = static_cast<size_t>(batch_size) * static_cast<size_t>(shape.num_q_tokens * num_q_heads);
  q_.resize(num_rows * static_cast<size_t>(shape.head_dim));
  for (float& x : q_) x = 2 * uniform(state);
  out.assign(q_.size(), NAN);
  lse.assign(num_rows, NAN);
  for (int h = 0; h < num_q_heads; ++h) {
    alibi_slopes_.push_back(0.02f * static_cast<float>(h + 1));
    sinks_.push_back(0.3f * static_cast<float>(h) - 1.f);
  }
  seq_lens_ = shape.seq_lens;
  for (int32_t length : seq_lens_) seq_starts_.push_back(length / 3);
  make_cache(shape);
  fill_cache(shape);

  const int64_t d = shape.head_dim;
  params.q = {q_.data(), shape.num_q_tokens * num_q_heads * d, num_q_heads * d, d};
  params.out = {out.data(), shape.num_q_tokens * num_q_heads * d, num_q_heads * d, d};
  params.lse = lse.data();
  params.batch_size = batch_size;
  params.num_q_tokens = shape.num_q_tokens;
  params.num_q_heads = num_q_heads;
  params.seq_lens = {seq_lens_.data()};
  params.sm_scale = 1.f / std::sqrt(static_cast<float>(shape.head_dim));
  params.sliding_window = shape.sliding_window;
  params.logits_soft_cap = shape.logits_soft_cap;
  if (shape.has_alibi) params.alibi_slopes = {alibi_slopes_.data()};
  if (shape.has_sinks) params.sinks = {sinks_.data()};
  if (shape.has_starts) params.seq_starts = {seq_starts_.data()};
}

ScaleView Problem::make_scale(const Shape& shape, bool has_scale, float size, std::vector<uint16_t>& halves,
                              std::vector<float>& floats) {
  if (!has_scale) return {};
  const int64_t heads = shape.num_kv_heads;
  if (shape.granularity == ScaleGranularity::kTokenHead) {
    halves.assign(static_cast<size_t>(params.cache.num_pages * shape.page_size * heads), 0x7E00);  // NaN
    return {ScaleGranularity::kTokenHead, halves.data(), shape.page_size * heads, heads, 1};
  }
  for (int h = 0; h < heads; ++h) floats.push_back(size * (1.f + 0.1f * static_cast<float>(h)));
  if (shape.granularity == ScaleGranularity::kTensor) return {ScaleGranularity::kTensor, floats.data()};
  return {ScaleGranularity::kHead, floats.data(), 0, 0, 1};
}

void Problem::make_cache(const Shape& shape) {
  int64_t max_pages = 1, page = 1;
  for (int32_t length : shape.seq_lens) max_pages = std::max<int64_t>(max_pages, length / shape.page_size + 2);
  page_table_.assign(shape.seq_lens.size() * static_cast<size_t>(max_pages), -1);
  for (size_t b = 0; b < shape.seq_lens.size(); ++b)
    for (int64_t i = 0; i * shape.page_size < shape.seq_lens[b]; ++i)
      page_table_[b * static_cast<size_t>(max_pages) + static_cast<size_t>(i)] = static_cast<int32_t>(page++);
  KvCacheView& cache = params.cache;
  cache.format = shape.format;
  cache.num_pages = page;
  cache.page_size = shape.page_size;
  cache.num_kv_heads = shape.num_kv_heads;
  cache.head_dim = shape.head_dim;
  const int64_t d = shape.head_dim, heads = shape.num_kv_heads, size = page * shape.page_size * heads * d;
  k_codes_.assign(static_cast<size_t>(size * code_bytes(shape.format.k)), 0x7F);  // NaN in every float format
  v_codes_.assign(static_cast<size_t>(size * code_bytes(shape.format.v)), 0xFF);
  cache.k_codes = {k_codes_.data(), shape.page_size * heads * d, heads * d, d};
  cache.v_codes = {v_codes_.data(), shape.page_size * heads * d, heads * d, d};
  cache.k_scale = make_scale(shape, info(shape.format.k).has_scale, 0.015f, k_scale_, k_static_);
  cache.v_scale = make_scale(shape, info(shape.format.v).has_scale, 0.04f, v_scale_, v_static_);
  uint32_t state = shape.seed + 77;
  for (int64_t i = 0; i < heads * d; ++i) k_offset_.push_back(6 * uniform(state));
  if (shape.has_offset) cache.k_offset = {k_offset_.data(), d};
  params.page_table = {page_table_.data(), max_pages, 1};
  params.max_pages = static_cast<int>(max_pages);
}

void Problem::fill_cache(const Shape& shape) {
  uint32_t state = shape.seed * 7919u + 3u;
  const int64_t d = shape.head_dim, heads = shape.num_kv_heads;
  for (size_t b = 0; b < shape.seq_lens.size(); ++b) {
    const int64_t length = shape.seq_lens[b];
    std::vector<float> k(static_cast<size_t>(length * heads * d)), v(k.size());
    for (size_t i = 0; i < k.size(); ++i)
      k[i] = 1.5f * uniform(state) + (shape.has_offset ? k_offset_[i % k_offset_.size()] : 0.f);
    for (float& x : v) x = 4.f * uniform(state);
    std::vector<int64_t> slots;
    for (int64_t j = 0; j < length; ++j)
      slots.push_back(params.page_table.at(static_cast<int64_t>(b), j / shape.page_size) * int64_t{shape.page_size} +
                      j % shape.page_size);
    AppendParams append;
    append.k = {k.data(), 0, heads * d, d};
    append.v = {v.data(), 0, heads * d, d};
    append.num_tokens = length;
    append.slot_mapping = {slots.data()};
    append.cache = params.cache;
    append_kv(append, {});
  }
}

DecodePlan Problem::run(const Execution& execution) {
  validate(params.cache, "problem");
  const DecodePlan plan = plan_decode_attention(params, execution);
  // Exactly as many bytes as promised, so that a sanitizer sees the first one too many; NaN, so that reading one shows.
  constexpr size_t kAlignment = 256;
  const auto size = static_cast<size_t>(plan.workspace_bytes);
  const std::unique_ptr<void, void (*)(void*)> scratch(
      std::aligned_alloc(kAlignment, (size + kAlignment) / kAlignment * kAlignment), std::free);
  std::fill_n(static_cast<uint8_t*>(scratch.get()), size, uint8_t{0xFF});
  decode_attention(params, execution, plan, {scratch.get(), nullptr});
  return plan;
}

void Problem::check(const Execution& execution) {
  const DecodePlan plan = run(execution);
  CHECK(execution.kernel.empty() || plan.variant == execution.kernel, "forced ", execution.kernel, ", ran ", plan.variant);
  const bool is_8bit = info(shape_.format.k).has_scale || info(shape_.format.v).has_scale;
  check_result(is_8bit ? 1e-3 : 1e-5, text(plan.variant, ", splits ", plan.num_splits));  // as in tests/bridge.py
}

void Problem::clear_outputs() {
  std::fill(out.begin(), out.end(), NAN);
  std::fill(lse.begin(), lse.end(), NAN);
}

void Problem::check_result(double tolerance, std::string_view ran) const {
  const ReferenceResult expected = reference_decode(params);
  double error = 0, norm = 0, lse_error = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    error += (out[i] - expected.out[i]) * (out[i] - expected.out[i]);
    norm += expected.out[i] * expected.out[i];
  }
  for (size_t i = 0; i < lse.size(); ++i)
    if (static_cast<double>(lse[i]) != expected.lse[i])
      lse_error = std::max(lse_error, std::isnan(lse[i]) ? INFINITY : std::abs(lse[i] - expected.lse[i]));
  const double relative = std::sqrt(error / std::max(norm, 1e-30));
  CHECK(error == 0 || relative <= tolerance, relative, " on ", ran, ", ", describe(shape_));
  CHECK(lse_error <= 2 * tolerance, lse_error, " in lse on ", ran, ", ", describe(shape_));
}

}  // namespace quantattn_test
