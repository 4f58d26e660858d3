#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "length_spec.h"
#include "quantattn/kv_cache.h"
#include "quantattn/kv_format.h"
#include "quantattn/types.h"
#include "tensor_file.h"

namespace sample_runner {

enum class Mode : uint8_t { kDecode, kPrefill, kHybrid };
inline constexpr std::string_view kModeNames[] = {"decode", "prefill", "hybrid"};

enum class ReportFormat : uint8_t { kText, kCsv, kJson };

// Where attention finds K and V: in a cache of this format, or, without one, in fresh tensors of q's type.
using KvSource = std::optional<quantattn::KvPair>;
constexpr std::string_view kFreshName = "fresh";
std::string name(KvSource source);

// Where the scales of K or of V come from.
struct ScaleSpec {
  std::optional<quantattn::ScaleGranularity> granularity;  // none: per (token, KV head) where the format has scales
  std::vector<float> values;                               // empty: derived from the data
  std::string file;                                        // the tensor's shape selects the granularity
};

// ALiBi slopes or sinks.
struct PerHeadSpec {
  enum class Kind : uint8_t { kNone, kStandard, kValues };
  Kind kind = Kind::kNone;
  std::vector<float> values;
};

// What the command line says. Sizes that it leaves open come from loaded files, then from the defaults in problem.cc.
struct Options {
  bool wants_help = false, wants_info = false;

  Mode mode = Mode::kDecode;
  int prefill_percent = 50;
  bool is_causal = true;
  std::optional<int> batch_size, num_q_heads, num_kv_heads, head_dim;
  std::optional<LengthSpec> seq_q, seq_k, seq_starts;
  quantattn::DType q_dtype = quantattn::DType::kFloat16;

  std::vector<KvSource> sources;  // never empty once parsed
  ScaleSpec k_scale, v_scale;
  int page_size = 0;
  bool is_hnd = false;

  std::optional<float> sm_scale;
  PerHeadSpec alibi, sinks;
  int sliding_window = 0;
  float logits_soft_cap = 0.f;

  uint64_t seed = 0;
  std::string q_file, k_file, v_file;
  std::optional<ElementType> file_type;

  quantattn::Device device;
  int num_threads = 0;
  std::string kernel;
  int num_splits = 0;
  bool is_batch_invariant = false;

  int warmup_iterations = 2, profiling_iterations = 10;
  int flush_mib = 0;
  bool has_check = true;
  std::optional<double> tolerance;
  ReportFormat report = ReportFormat::kText;
};

// Throws UsageError.
Options parse_command_line(std::span<const std::string_view> arguments);
std::string help_text();

}  // namespace sample_runner
