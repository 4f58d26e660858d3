#include "scale_values.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "number_types.h"
#include "option_parser.h"

namespace sample_runner {
namespace {

using quantattn::ScaleGranularity;

// The largest magnitude of each KV head over the whole batch.
std::vector<float> magnitudes(const RowSource& rows, const Problem& p) {
  constexpr int64_t kChunk = 1024;
  std::vector<float> largest(static_cast<size_t>(p.num_kv_heads), 0.f);
  std::vector<float> chunk(static_cast<size_t>(kChunk * p.num_kv_heads * p.head_dim));
  for (int b = 0; b < p.batch_size; ++b)
    for (int64_t first = 0; first < p.seq_lens[static_cast<size_t>(b)]; first += kChunk) {
      const int64_t count = std::min<int64_t>(kChunk, p.seq_lens[static_cast<size_t>(b)] - first);
      rows.read(b, first, count, chunk.data());
      for (int64_t i = 0; i < count * p.num_kv_heads * p.head_dim; ++i) {
        float& head = largest[static_cast<size_t>(i / p.head_dim % p.num_kv_heads)];
        head = std::max(head, std::fabs(chunk[static_cast<size_t>(i)]));
      }
    }
  return largest;
}

ScaleValues derive(ScaleGranularity granularity, quantattn::KvFormat format, const RowSource& rows, const Problem& p) {
  ScaleValues scales{granularity, magnitudes(rows, p), {}, 0};
  for (float& value : scales.per_head) value /= static_cast<float>(max_code(format));
  if (granularity == ScaleGranularity::kTensor) scales.per_head = {*std::ranges::max_element(scales.per_head)};
  return scales;
}

ScaleValues load(std::string_view option, const std::string& path, const RowSource& rows, const Problem& p) {
  const Tensor tensor = read_tensor(path, std::nullopt);
  ScaleValues scales;
  if (tensor.shape.size() == 3 && rows.holds_codes()) {
    const bool fits = tensor.type == ElementType::kFloat16 && tensor.shape[0] == p.batch_size &&
                      tensor.shape[1] >= p.max_seq_len() && tensor.shape[2] == p.num_kv_heads;
    if (!fits) throw UsageError(path + ": scales of each token and head must be float16 [B, L, Hkv] like the codes");
    scales.granularity = ScaleGranularity::kTokenHead;
    scales.tokens_per_sequence = tensor.shape[1];
    scales.per_token.resize(tensor.data.size() / sizeof(uint16_t));
    std::memcpy(scales.per_token.data(), tensor.data.data(), tensor.data.size());
    return scales;
  }
  const bool is_tensor = tensor.shape.empty(), is_head = tensor.shape == std::vector<int64_t>{p.num_kv_heads};
  if (tensor.type != ElementType::kFloat32 || (!is_tensor && !is_head))
    throw UsageError(std::string(option) + ": " + path + " must be float32 of shape [] or [" + std::to_string(p.num_kv_heads) +
                     "], or float16 [B, L, Hkv] beside loaded codes");
  scales.granularity = is_tensor ? ScaleGranularity::kTensor : ScaleGranularity::kHead;
  scales.per_head.resize(tensor.data.size() / sizeof(float));
  std::memcpy(scales.per_head.data(), tensor.data.data(), tensor.data.size());
  for (float scale : scales.per_head)
    if (!(scale > 0 && std::isfinite(scale))) fail_usage(path, "positive and finite", std::to_string(scale));
  return scales;
}

}  // namespace

ScaleValues make_scales(std::string_view option, const ScaleSpec& spec, quantattn::KvFormat format, const RowSource& rows,
                        const Problem& p) {
  if (!quantattn::info(format).has_scale) return {};
  if (!spec.file.empty()) return load(option, spec.file, rows, p);
  const ScaleGranularity granularity = spec.granularity.value_or(ScaleGranularity::kTokenHead);
  if (rows.holds_codes() && spec.values.empty())
    throw UsageError(std::string(option) + " must give the scales of the codes in " + rows.path() + ", got none");
  if (granularity == ScaleGranularity::kTokenHead) return {granularity, {}, {}, 0};
  if (spec.values.empty()) return derive(granularity, format, rows, p);
  const size_t expected = granularity == ScaleGranularity::kTensor ? 1 : static_cast<size_t>(p.num_kv_heads);
  if (spec.values.size() != expected)
    throw UsageError(std::string(option) + " must have " + std::to_string(expected) + " values, got " +
                     std::to_string(spec.values.size()));
  return {granularity, spec.values, {}, 0};
}

}  // namespace sample_runner
