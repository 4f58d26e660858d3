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

Work measure_work(const Problem& p, const std::vector<int>& sequences, int64_t num_bytes_of_token) {
  int64_t num_tokens_read = 0, num_scores = 0;
  for (int b : sequences) {
    int64_t first = p.seq_lens[static_cast<size_t>(b)], last = 0;
    for (int64_t token = 0; token < p.num_q_tokens_of(b); ++token) {
      const VisibleKeys keys = visible_keys(p, b, token);
      if (keys.first >= keys.last) continue;
      first = std::min(first, keys.first), last = std::max(last, keys.last);
      num_scores += keys.last - keys.first;
    }
    num_tokens_read += std::max<int64_t>(0, last - first);
  }
  return {static_cast<int64_t>(sequences.size()), num_tokens_read * num_bytes_of_token,
          4 * num_scores * p.num_q_heads * p.head_dim};
}

void measure_work(const Problem& p, const Options& options, int64_t num_bytes_of_token, Outcome& outcome) {
  outcome.work = measure_work(p, all_sequences(p), num_bytes_of_token);
  if (options.mode != Mode::kHybrid) return;
  outcome.prefill_work = measure_work(p, sequences_of_kind(p, true), num_bytes_of_token);
  outcome.decode_work = measure_work(p, sequences_of_kind(p, false), num_bytes_of_token);
}

CacheSize measure_size(const Cache& cache) {
  const quantattn::KvCacheView& view = cache.view();
  const int64_t num_elements = 2 * view.num_pages * view.page_size * view.num_kv_heads * view.head_dim;
  return {cache.num_bytes(), num_elements * 2,
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

ReferenceResult attend_over_fresh(const Problem& p, const FreshKv& kv) {
  return attend_in_float64(p, [&](int b, int head, int64_t length, std::vector<double>& k, std::vector<double>& v) {
    kv.read(FreshKv::Side::kK, b, head, length, k);
    kv.read(FreshKv::Side::kV, b, head, length, v);
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

void check_attention(const Problem& p, const ReferenceResult& reference, const Options& options, Outcome& outcome) {
  outcome.comparison = compare(p, *outcome.attention, reference, tolerance_of(options));
  outcome.messages = outcome.comparison->failures;
  if (!outcome.attention->is_reproducible)
    outcome.messages.push_back("repeated calls must give the same bits, got different ones");
}

void check_format(const Problem& p, const Cache& cache, const ReferenceResult& reference, Outcome& outcome) {
  outcome.k_codec = check_codec(p, cache, Cache::Side::kK);
  outcome.v_codec = check_codec(p, cache, Cache::Side::kV);
  outcome.output_format_error = relative_l2(reference.out, attend_over_originals(p).out);
  add_codec_failures("K", *outcome.k_codec, outcome.messages);
  add_codec_failures("V", *outcome.v_codec, outcome.messages);
}

void run_over_cache(const Problem& p, quantattn::KvPair format, const Options& options, DeviceMemory& memory,
                    Outcome& outcome) {
  Cache cache(p, format, options, memory);
  outcome.k_scale = granularity_name(cache.view().k_scale.granularity);
  outcome.v_scale = granularity_name(cache.view().v_scale.granularity);
  outcome.size = measure_size(cache);
  measure_work(p, options, cache.num_bytes_of_token(), outcome);
  outcome.attention = run_over_cache(p, cache, options, memory);
  if (!options.has_check) return;
  cache.download();
  const ReferenceResult reference = attend_over_cache(p, cache);
  check_attention(p, reference, options, outcome);
  if (!p.k.holds_codes()) check_format(p, cache, reference, outcome);
}

void run_over_fresh(const Problem& p, const Options& options, DeviceMemory& memory, Outcome& outcome) {
  const FreshKv kv(p, memory);
  measure_work(p, options, kv.num_bytes_of_token(), outcome);
  outcome.attention = run_over_fresh(p, kv, options, memory);
  if (options.has_check) check_attention(p, attend_over_fresh(p, kv), options, outcome);
}

}  // namespace

double tolerance_of(const Options& options) { return options.tolerance.value_or(default_tolerance(options.q_dtype)); }

Outcome run_experiment(const Problem& p, KvSource source, const Options& options, DeviceMemory& memory) {
  Outcome outcome;
  if (source)
    run_over_cache(p, *source, options, memory, outcome);
  else
    run_over_fresh(p, options, memory, outcome);
  if (options.has_check) outcome.status = outcome.messages.empty() ? Status::kRight : Status::kMismatch;
  return outcome;
}

}  // namespace sample_runner
