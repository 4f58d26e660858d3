#include "cache.h"

#include <algorithm>
#include <numeric>

#include "number_types.h"
#include "option_parser.h"
#include "quantattn/quantize.h"
#include "random_rows.h"

namespace sample_runner {
namespace {

using quantattn::KvFormat;
using quantattn::ScaleGranularity;

constexpr unsigned char kPoison = 0xFF;  // NaN in every float type; the NaN scale beside it spoils int8's -1

// Fisher and Yates, with the runner's own random numbers.
std::vector<int32_t> shuffled_pages(int64_t num_pages, uint64_t seed) {
  std::vector<int32_t> pages(static_cast<size_t>(num_pages));
  std::iota(pages.begin(), pages.end(), 0);
  for (size_t i = pages.size(); i > 1; --i) std::swap(pages[i - 1], pages[mix(seed, i) % i]);
  return pages;
}

}  // namespace

Cache::Cache(const Problem& problem, quantattn::KvPair format, const Options& options, DeviceMemory& memory)
    : is_hnd_(options.is_hnd), seq_lens_(problem.seq_lens) {
  view_.format = format;
  view_.num_kv_heads = problem.num_kv_heads;
  view_.head_dim = problem.head_dim;
  place_pages(problem, options, memory);
  const ScaleValues k_scales = make_scales("--k-scale", options.k_scale, format.k, problem.k, problem);
  const ScaleValues v_scales = make_scales("--v-scale", options.v_scale, format.v, problem.v, problem);
  k_ = make_half(format.k, k_scales, memory);
  v_ = make_half(format.v, v_scales, memory);
  view_.k_codes = k_.array, view_.k_scale = k_.scale;
  view_.v_codes = v_.array, view_.v_scale = v_.scale;
  quantattn::validate(view_, "sample_runner");
  if (problem.k.holds_codes() != problem.v.holds_codes())
    throw UsageError("--load-k and --load-v must both hold codes or both numbers");
  if (problem.k.holds_codes()) {
    store_codes(k_, "--load-k", problem.k, k_scales);
    store_codes(v_, "--load-v", problem.v, v_scales);
  } else {
    append(problem, options, memory);
  }
}

void Cache::place_pages(const Problem& problem, const Options& options, DeviceMemory& memory) {
  if (options.page_size == 0) {
    view_.page_size = std::max(1, problem.max_seq_len());
    view_.num_pages = problem.batch_size;
    return;
  }
  view_.page_size = options.page_size;
  const auto pages_of = [&](int64_t length) { return (length + options.page_size - 1) / options.page_size; };
  for (int32_t length : seq_lens_) view_.num_pages += pages_of(length);
  max_pages_ = std::max(1, static_cast<int>(pages_of(problem.max_seq_len())));
  const std::vector<int32_t> pages = shuffled_pages(view_.num_pages, options.seed);
  host_page_table_.assign(seq_lens_.size() * static_cast<size_t>(max_pages_), -1);
  auto next = pages.begin();
  for (size_t b = 0; b < seq_lens_.size(); ++b)
    for (int64_t i = 0; i < pages_of(seq_lens_[b]); ++i)
      host_page_table_[b * static_cast<size_t>(max_pages_) + static_cast<size_t>(i)] = *next++;
  page_table_ = Buffer::of<int32_t>(memory, host_page_table_);
}

Cache::Half Cache::make_half(KvFormat format, const ScaleValues& scales, DeviceMemory& memory) const {
  Half half{.format = format, .codes = {}, .scale_data = {}, .array = {}, .scale = {}, .host_codes = {}, .host_scales = {}};
  const int64_t tokens = view_.page_size, heads = view_.num_kv_heads, dim = view_.head_dim;
  const int64_t num_vectors = view_.num_pages * tokens * heads;
  half.codes = Buffer(memory, static_cast<size_t>(num_vectors * dim * quantattn::code_bytes(format)), kPoison);
  half.array = {half.codes.as<void>(), tokens * heads * dim, is_hnd_ ? dim : heads * dim, is_hnd_ ? tokens * dim : dim};
  half.scale.granularity = scales.granularity;
  if (scales.granularity == ScaleGranularity::kTokenHead) {
    half.scale_data = Buffer(memory, static_cast<size_t>(num_vectors) * sizeof(uint16_t), kPoison);
    half.scale.page_stride = tokens * heads;
    half.scale.token_stride = is_hnd_ ? 1 : heads;
    half.scale.head_stride = is_hnd_ ? tokens : 1;
  } else if (scales.granularity != ScaleGranularity::kNone) {
    half.scale_data = Buffer::of<float>(memory, scales.per_head);
    half.scale.head_stride = scales.granularity == ScaleGranularity::kHead ? 1 : 0;
  }
  half.scale.data = half.scale_data.as<void>();
  return half;
}

int64_t Cache::page_of(int b, int64_t token) const {
  if (host_page_table_.empty()) return b;
  return host_page_table_[static_cast<size_t>(int64_t{b} * max_pages_ + token / view_.page_size)];
}

void Cache::append(const Problem& problem, const Options& options, DeviceMemory& memory) {
  constexpr int64_t kChunk = 2048;
  const int64_t row_size = int64_t{problem.num_kv_heads} * problem.head_dim;
  const quantattn::Execution execution{
      .device = options.device, .stream = nullptr, .num_threads = options.num_threads, .kernel = {}};
  std::vector<float> k_rows(static_cast<size_t>(kChunk * row_size)), v_rows(k_rows.size());
  Buffer k(memory, k_rows.size() * sizeof(float), 0), v(memory, v_rows.size() * sizeof(float), 0);
  Buffer slots(memory, kChunk * sizeof(int64_t), 0);
  std::vector<int64_t> host_slots(kChunk);
  for (int b = 0; b < problem.batch_size; ++b)
    for (int64_t first = 0; first < seq_lens_[static_cast<size_t>(b)]; first += kChunk) {
      const int64_t count = std::min(kChunk, seq_lens_[static_cast<size_t>(b)] - first);
      problem.k.read(b, first, count, k_rows.data());
      problem.v.read(b, first, count, v_rows.data());
      for (int64_t t = 0; t < count; ++t)
        host_slots[static_cast<size_t>(t)] = page_of(b, first + t) * view_.page_size + (first + t) % view_.page_size;
      k.write(std::as_bytes(std::span(k_rows)));
      v.write(std::as_bytes(std::span(v_rows)));
      slots.write(std::as_bytes(std::span(host_slots)));
      quantattn::AppendParams params;
      params.k = {k.as<void>(), 0, row_size, problem.head_dim};
      params.v = {v.as<void>(), 0, row_size, problem.head_dim};
      params.num_tokens = count;
      params.slot_mapping.data = slots.as<const int64_t>();
      params.cache = view_;
      quantattn::append_kv(params, execution);
    }
}

void Cache::store_codes(Half& half, std::string_view option, const RowSource& rows, const ScaleValues& scales) {
  const ElementType needed = half.format == KvFormat::kInt8 ? ElementType::kInt8 : ElementType::kUint8;
  if (quantattn::code_bytes(half.format) != 1 || rows.type() != needed)
    fail_usage(option, "codes of " + std::string(quantattn::name(half.format)) + " (" + std::string(name(needed)) + ")",
               name(rows.type()));
  std::vector<std::byte> codes(half.codes.size(), std::byte{kPoison});
  std::vector<uint16_t> token_scales = half.scale_data.read<uint16_t>();
  for (int b = 0; b < static_cast<int>(seq_lens_.size()); ++b)
    for (int64_t t = 0; t < seq_lens_[static_cast<size_t>(b)]; ++t)
      for (int head = 0; head < view_.num_kv_heads; ++head) {
        const int64_t page = page_of(b, t), token = t % view_.page_size;
        std::copy_n(rows.codes(b, t) + int64_t{head} * view_.head_dim, view_.head_dim,
                    codes.begin() + half.array.offset(page, token, head));
        if (!scales.per_token.empty())
          token_scales[static_cast<size_t>(half.scale.offset(page, token, head))] =
              scales.per_token[static_cast<size_t>((b * scales.tokens_per_sequence + t) * view_.num_kv_heads + head)];
      }
  half.codes.write(codes);
  if (!scales.per_token.empty()) half.scale_data.write(std::as_bytes(std::span(token_scales)));
}

quantattn::Strided2D<const int32_t> Cache::page_table() const {
  if (host_page_table_.empty()) return {};
  return {page_table_.as<const int32_t>(), max_pages_, 1};
}

std::vector<int32_t> Cache::pages_of(std::span<const int> sequences) const {
  if (host_page_table_.empty()) return {sequences.begin(), sequences.end()};
  std::vector<int32_t> pages;
  for (int b : sequences) {
    const auto row = host_page_table_.begin() + int64_t{b} * max_pages_;
    pages.insert(pages.end(), row, row + max_pages_);
  }
  return pages;
}

int64_t Cache::num_bytes() const {
  return static_cast<int64_t>(k_.codes.size() + k_.scale_data.size() + v_.codes.size() + v_.scale_data.size());
}

int64_t Cache::num_bytes_of_token() const {
  const auto vector_bytes = [&](const Half& half) {
    const int64_t scale_bytes = half.scale.granularity == ScaleGranularity::kTokenHead ? 2 : 0;
    return int64_t{view_.head_dim} * quantattn::code_bytes(half.format) + scale_bytes;
  };
  return view_.num_kv_heads * (vector_bytes(k_) + vector_bytes(v_));
}

void Cache::download() {
  for (Half* half : {&k_, &v_}) {
    half->host_codes = half->codes.read<std::byte>();
    half->host_scales = half->scale_data.size() > 0 ? half->scale_data.read<std::byte>() : std::vector<std::byte>{};
  }
}

double Cache::scale_of(const Half& half, int64_t page, int64_t token, int head) {
  if (half.scale.granularity == ScaleGranularity::kNone) return 1;
  const bool is_half = half.scale.granularity == ScaleGranularity::kTokenHead;
  return decode(is_half ? quantattn::DType::kFloat16 : quantattn::DType::kFloat32, half.host_scales.data(),
                half.scale.offset(page, token, head));
}

}  // namespace sample_runner
