#include "experiment.h"

#include <algorithm>

#include "number_types.h"

namespace sample_runner {
namespace {

using quantattn::ScaleGranularity;

std::string granularity_name(ScaleGranularity granularity) {
  switch (granularity) {
    case ScaleGranularity::kNone:
      return "none";
    case ScaleGranularity::kTensor:
      return "tensor";
    case ScaleGranularity::kHead:
      return "head";
    case ScaleGranularity::kTokenHead:
      return "token_head";
  }
  return {};
}

int64_t num_visible_tokens(const Problem& p) {
  int64_t total = 0;
  for (size_t b = 0; b < p.seq_lens.size(); ++b) {
    const int64_t length = p.seq_lens[b], first_position = std::max<int64_t>(0, length - p.num_q_tokens);
    const int64_t start = p.seq_starts.empty() ? 0 : p.seq_starts[b];
    const int64_t window_start = p.sliding_window > 0 ? first_position - p.sliding_window + 1 : 0;
    total += std::max<int64_t>(0, length - std::max(start, window_start));
  }
  return total;
}

CacheSize measure(const Problem& p, const Cache& cache) {
  const quantattn::KvCacheView& view = cache.view();
  const int64_t num_elements = 2 * view.num_pages * view.page_size * view.num_kv_heads * view.head_dim;
  return {cache.num_bytes(), num_elements * 2, num_visible_tokens(p) * cache.num_bytes_of_token(),
          num_elements > 0 ? 8. * static_cast<double>(cache.num_bytes()) / static_cast<double>(num_elements) : 0.};
}

ReferenceResult attend_over_cache(const Problem& p, const Cache& cache) {
  const auto read_half = [&](Cache::Side side, quantattn::KvFormat format, int b, int head, int64_t length,
                             std::vector<double>& rows) {
    const std::span<const double> values = code_values(format);
    rows.clear();
    rows.reserve(static_cast<size_t>(length * p.head_dim));
    cache.visit(side, b, head, length, [&](uint16_t code, double scale) { rows.push_back(values[code] * scale); });
  };
  return attend_in_float64(p, [&](int b, int head, int64_t length, std::vector<double>& k, std::vector<double>& v) {
    read_half(Cache::Side::kK, cache.view().format.k, b, head, length, k);
    read_half(Cache::Side::kV, cache.view().format.v, b, head, length, v);
  });
}

ReferenceResult attend_over_originals(const Problem& p) {
  const auto read_half = [&](const RowSource& source, int b, int head, int64_t length, std::vector<double>& rows) {
    std::vector<float> vector(static_cast<size_t>(p.head_dim));
    rows.clear();
    for (int64_t t = 0; t < length; ++t) {
      source.read_vector(b, t, head, vector.data());
      rows.insert(rows.end(), vector.begin(), vector.end());
    }
  };
  return attend_in_float64(p, [&](int b, int head, int64_t length, std::vector<double>& k, std::vector<double>& v) {
    read_half(p.k, b, head, length, k);
    read_half(p.v, b, head, length, v);
  });
}

void add_codec_failures(std::string_view side, const CodecCheck& codec, std::vector<std::string>& messages) {
  if (codec.num_wrong_codes > 0)
    messages.push_back(std::string(side) + ": every code must be the nearest of its format, got " +
                       std::to_string(codec.num_wrong_codes) + " that are not");
  if (codec.num_wrong_scales > 0)
    messages.push_back(std::string(side) +
                       ": every dynamic scale must be the largest magnitude / largest code rounded up to float16, got " +
                       std::to_string(codec.num_wrong_scales) + " that are not");
}

void check(const Problem& p, Cache& cache, const Options& options, Outcome& outcome) {
  cache.download();
  const ReferenceResult reference = attend_over_cache(p, cache);
  outcome.comparison = compare(p, *outcome.decode, reference, tolerance_of(options));
  outcome.messages = outcome.comparison->failures;
  if (!p.k.holds_codes()) {
    outcome.k_codec = check_codec(p, cache, Cache::Side::kK);
    outcome.v_codec = check_codec(p, cache, Cache::Side::kV);
    outcome.output_format_error = relative_l2(reference.out, attend_over_originals(p).out);
    add_codec_failures("K", *outcome.k_codec, outcome.messages);
    add_codec_failures("V", *outcome.v_codec, outcome.messages);
  }
  if (!outcome.decode->is_reproducible)
    outcome.messages.push_back("repeated steps must give the same bits, got different ones");
  outcome.status = outcome.messages.empty() ? Status::kRight : Status::kMismatch;
}

}  // namespace

double tolerance_of(const Options& options) { return options.tolerance.value_or(default_tolerance(options.q_dtype)); }

Outcome run_experiment(const Problem& p, quantattn::KvPair format, const Options& options, DeviceMemory& memory) {
  Outcome outcome;
  Cache cache(p, format, options, memory);
  outcome.k_scale = granularity_name(cache.view().k_scale.granularity);
  outcome.v_scale = granularity_name(cache.view().v_scale.granularity);
  outcome.size = measure(p, cache);
  outcome.decode = run_decode(p, cache, options, memory);
  if (options.has_check) check(p, cache, options, outcome);
  return outcome;
}

}  // namespace sample_runner
