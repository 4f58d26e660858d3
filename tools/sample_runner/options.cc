#include "options.h"

#include <cmath>
#include <limits>

#include "option_parser.h"
#include "quantattn/runtime.h"

namespace sample_runner {
namespace {

using quantattn::KvFormat;
using quantattn::KvPair;
using quantattn::ScaleGranularity;

constexpr int kMaxInt = std::numeric_limits<int>::max();

int parse_int(std::string_view who, std::string_view text, int least, int most = kMaxInt) {
  return static_cast<int>(parse_integer(who, text, least, most));
}

std::string pair_names() {
  std::string names;
  for (KvPair pair : quantattn::kv_pairs()) names += (names.empty() ? "" : ", ") + std::string(quantattn::name(pair));
  return names;
}

// Broken after a comma, for the help.
std::string wrapped(std::string text) {
  constexpr size_t kWidth = 70;
  for (size_t start = 0; text.size() - start > kWidth;) {
    const size_t comma = text.rfind(", ", start + kWidth);
    if (comma == std::string::npos || comma <= start) break;
    text.replace(comma, 2, ",\n");
    start = comma + 2;
  }
  return text;
}

std::vector<KvSource> parse_sources(std::string_view who, std::string_view text) {
  if (text == "all") return {quantattn::kv_pairs().begin(), quantattn::kv_pairs().end()};
  std::vector<KvSource> sources;
  for (std::string_view part : split(text, ',')) {
    const KvSource source = quantattn::parse_kv_pair(part);
    if (!source && part != kFreshName) fail_usage(who, "'all' or a list of " + pair_names() + ", fresh", part);
    sources.push_back(source);
  }
  return sources;
}

KvFormat parse_format(std::string_view who, std::string_view text) {
  std::vector<std::string_view> names;
  for (const quantattn::KvFormatInfo& row : quantattn::kKvFormats) names.push_back(row.name);
  return static_cast<KvFormat>(parse_choice(who, text, names));
}

ScaleSpec parse_scale(std::string_view who, std::string_view text) {
  constexpr std::string_view kRule = "token_head, head, tensor, head:A,B,..., tensor:A or file:PATH";
  const size_t colon = text.find(':');
  const std::string_view kind = text.substr(0, colon);
  const bool has_value = colon != std::string_view::npos;
  const std::string_view value = has_value ? text.substr(colon + 1) : std::string_view{};
  if (kind == "file" && !value.empty()) return {std::nullopt, {}, std::string(value)};
  if (kind == "token_head" && !has_value) return {ScaleGranularity::kTokenHead, {}, {}};
  if (kind != "head" && kind != "tensor") fail_usage(who, kRule, text);
  const ScaleGranularity granularity = kind == "head" ? ScaleGranularity::kHead : ScaleGranularity::kTensor;
  if (!has_value) return {granularity, {}, {}};
  std::vector<float> values = parse_numbers(who, value);
  for (float scale : values)
    if (!(scale > 0)) fail_usage(who, "positive scales", text);
  if (granularity == ScaleGranularity::kTensor && values.size() != 1) fail_usage(who, "tensor:A with one value", text);
  return {granularity, std::move(values), {}};
}

PerHeadSpec parse_per_head(std::string_view who, std::string_view text, bool has_standard) {
  if (text == "none") return {};
  if (text == "standard" && has_standard) return {PerHeadSpec::Kind::kStandard, {}};
  return {PerHeadSpec::Kind::kValues, parse_numbers(who, text)};
}

quantattn::Device parse_device(std::string_view who, std::string_view text) {
  if (text == "cpu") return {};
  if (text == "cuda") return {quantattn::DeviceKind::kCuda, 0};
  if (!text.starts_with("cuda:")) fail_usage(who, "cpu, cuda or cuda:INDEX", text);
  return {quantattn::DeviceKind::kCuda, parse_int(who, text.substr(5), 0, 1023)};
}

float parse_positive(std::string_view who, std::string_view text) {
  const auto number = static_cast<float>(parse_number(who, text));
  if (number < 0 || !std::isfinite(number)) fail_usage(who, "a number of at least 0", text);
  return number;
}

// Filled by the table's rows; K and V formats given apart are joined once both are known.
struct Parsed {
  Options options;
  std::optional<quantattn::Device> device;
  std::optional<Mode> mode;
  std::optional<KvFormat> k_format, v_format;
  std::optional<int> prefill_percent;
};

void set_mode(Parsed& p, Mode mode) {
  if (p.mode) throw UsageError("--mode, --decoding and --hybrid exclude each other, got two of them");
  p.mode = mode;
}

std::vector<Option> mode_rows(Parsed& p) {
  Options& o = p.options;
  return {
      {"", "", "What runs", {}},
      {"--mode", "MODE",
       "decode (default): few query tokens of each sequence over a cache;\nprefill: many, over fresh K and V or a cache; "
       "hybrid: a batch over a\ncache in which some sequences prefill and the others decode one token",
       [&](auto v) { set_mode(p, static_cast<Mode>(parse_choice("--mode", v, kModeNames))); }},
      {"--decoding", "", "short for --mode decode", [&](auto) { set_mode(p, Mode::kDecode); }},
      {"--hybrid", "", "short for --mode hybrid", [&](auto) { set_mode(p, Mode::kHybrid); }},
      {"--prefill-fraction", "PERCENT", "sequences of a hybrid batch that prefill, 0 to 100 (default 50)",
       [&](auto v) { p.prefill_percent = parse_int("--prefill-fraction", v, 0, 100); }},
      {"--causal", "on|off", "a query sees no later key (default on; decode is always causal)",
       [&](auto v) { o.is_causal = parse_on_off("--causal", v); }},
  };
}

std::vector<Option> shape_rows(Options& o) {
  return {
      {"", "", "Shapes", {}},
      {"--batch-size", "N", "sequences (default: as many as --seq-k lists, else 8, to prefill 1)",
       [&](auto v) { o.batch_size = parse_int("--batch-size", v, 0); }},
      {"--seq-q", "LENGTHS",
       "query tokens of each sequence, as --seq-k: to decode one number, 1 to 16\n(default 1); to prefill any, of the "
       "sequences that do (default: all tokens)",
       [&](auto v) { o.seq_q = parse_lengths("--seq-q", v); }},
      {"--seq-k", "LENGTHS",
       "keys of each sequence, the query tokens' included: N, A,B,... (one per\nsequence), uniform:MIN:MAX or "
       "lognormal:MEAN:CV (default 1024)",
       [&](auto v) { o.seq_k = parse_lengths("--seq-k", v); }},
      {"--seq-starts", "LENGTHS", "first visible key of each sequence, as --seq-k (default: all visible)",
       [&](auto v) { o.seq_starts = parse_lengths("--seq-starts", v); }},
      {"--num-q-heads", "N", "query heads (default 32)", [&](auto v) { o.num_q_heads = parse_int("--num-q-heads", v, 1); }},
      {"--num-kv-heads", "N", "KV heads, a divisor of the query heads (default: as many)",
       [&](auto v) { o.num_kv_heads = parse_int("--num-kv-heads", v, 1); }},
      {"--head-dim", "N", "elements of a head (default 128)", [&](auto v) { o.head_dim = parse_int("--head-dim", v, 1); }},
      {"--q-dtype", "TYPE", "float16 (default), bfloat16 or float32",
       [&](auto v) {
         static constexpr std::string_view kNames[] = {"float32", "float16", "bfloat16"};
         o.q_dtype = static_cast<quantattn::DType>(parse_choice("--q-dtype", v, kNames));
       }},
  };
}

std::vector<Option> cache_rows(Parsed& p) {
  Options& o = p.options;
  const std::string scales =
      "token_head (default where the format has scales), head or tensor:\nderived from the data; head:A,B,... or tensor:A: "
      "given;\nfile:PATH: a .npy file of shape [] or [Hkv] (float32)";
  return {
      {"", "", "Cache", {}},
      {"--kv-format", "PAIRS",
       "'all' or a list (default int8) of\n" + wrapped(pair_names()) +
           "\nor, to prefill, fresh (its default): K and V of q's type, no cache",
       [&](auto v) { o.sources = parse_sources("--kv-format", v); }},
      {"--k-format", "FORMAT", "the format of K, with --v-format instead of --kv-format",
       [&](auto v) { p.k_format = parse_format("--k-format", v); }},
      {"--v-format", "FORMAT", "the format of V", [&](auto v) { p.v_format = parse_format("--v-format", v); }},
      {"--k-scale", "SCALE", scales + "\nor, for K of codes, [B, L, Hkv] (float16)",
       [&](auto v) { o.k_scale = parse_scale("--k-scale", v); }},
      {"--v-scale", "SCALE", "the same for V", [&](auto v) { o.v_scale = parse_scale("--v-scale", v); }},
      {"--page-size", "N", "tokens of a page; 0 (default): contiguous, one page per sequence",
       [&](auto v) { o.page_size = parse_int("--page-size", v, 0); }},
      {"--layout", "LAYOUT", "NHD (default) or HND: order of token and head axes in a page",
       [&](auto v) {
         static constexpr std::string_view kNames[] = {"NHD", "HND"};
         o.is_hnd = parse_choice("--layout", v, kNames) == 1;
       }},
  };
}

std::vector<Option> score_rows(Options& o) {
  return {
      {"", "", "Scores", {}},
      {"--sm-scale", "X", "multiplies q.k (default 1/sqrt(head_dim))",
       [&](auto v) { o.sm_scale = static_cast<float>(parse_number("--sm-scale", v)); }},
      {"--alibi", "SLOPES", "none (default), standard, or one slope per query head (or per sequence\nand head)",
       [&](auto v) { o.alibi = parse_per_head("--alibi", v, true); }},
      {"--sliding-window", "N", "keys that a query sees, itself included; 0 (default): all",
       [&](auto v) { o.sliding_window = parse_int("--sliding-window", v, 0); }},
      {"--logits-soft-cap", "X", "cap * tanh(score / cap); 0 (default): none",
       [&](auto v) { o.logits_soft_cap = parse_positive("--logits-soft-cap", v); }},
      {"--sinks", "VALUES", "none (default), or the sink logit of every head or of each",
       [&](auto v) { o.sinks = parse_per_head("--sinks", v, false); }},
  };
}

std::vector<Option> data_rows(Options& o) {
  return {
      {"", "", "Data", {}},
      {"--seed", "N", "of the generated data and of page placement (default 0)",
       [&](auto v) { o.seed = static_cast<uint64_t>(parse_integer("--seed", v, 0, std::numeric_limits<int64_t>::max())); }},
      {"--load-q", "PATH", "q [B, n, Hq, D] from a .npy or raw file, instead of generated",
       [&](auto v) { o.q_file = parse_text("--load-q", v); }},
      {"--load-k", "PATH",
       "K [B, L, Hkv, D], L at least the longest sequence; int8 or uint8 holds\ncodes of the format and needs --k-scale values",
       [&](auto v) { o.k_file = parse_text("--load-k", v); }},
      {"--load-v", "PATH", "V, likewise", [&](auto v) { o.v_file = parse_text("--load-v", v); }},
      {"--load-type", "TYPE",
       "float32, float16, bfloat16, int8 or uint8: the type of raw files;\nbfloat16 also for .npy files of uint16",
       [&](auto v) { o.file_type = static_cast<ElementType>(parse_choice("--load-type", v, kElementTypeNames)); }},
  };
}

std::vector<Option> execution_rows(Parsed& p) {
  Options& o = p.options;
  return {
      {"", "", "Execution", {}},
      {"--device", "DEVICE",
       "cpu, cuda or cuda:INDEX (default: a GPU where there is one and\nneither --threads nor a CPU's --kernel is given)",
       [&](auto v) { p.device = parse_device("--device", v); }},
      {"--threads", "N", "CPU threads of the kernels; 0 (default): every core",
       [&](auto v) { o.num_threads = parse_int("--threads", v, 0, 4096); }},
      {"--kernel", "VARIANT", "forces a kernel variant that --info lists (default: the backend's choice)",
       [&](auto v) { o.kernel = parse_text("--kernel", v); }},
      {"--num-splits", "N", "parts of the KV axis; 0 (default): chosen",
       [&](auto v) { o.num_splits = parse_int("--num-splits", v, 0); }},
      {"--batch-invariant", "on|off", "fixed split size (default off)",
       [&](auto v) { o.is_batch_invariant = parse_on_off("--batch-invariant", v); }},
  };
}

std::vector<Option> measurement_rows(Options& o) {
  return {
      {"", "", "Measurement and check", {}},
      {"--warmup-iterations", "N", "steps before timing (default 2)",
       [&](auto v) { o.warmup_iterations = parse_int("--warmup-iterations", v, 0); }},
      {"--profiling-iterations", "N", "timed steps (default 10)",
       [&](auto v) { o.profiling_iterations = parse_int("--profiling-iterations", v, 1); }},
      {"--flush-mib", "N",
       "memory written before each timed step, to push the cache out of the\nprocessor's caches (default 0)",
       [&](auto v) { o.flush_mib = parse_int("--flush-mib", v, 0, 65536); }},
      {"--check", "on|off", "compare with the float64 reference (default on)",
       [&](auto v) { o.has_check = parse_on_off("--check", v); }},
      {"--tolerance", "X", "relative L2 error that an output row may have (default 1e-3, plus the\nrounding of q's type)",
       [&](auto v) { o.tolerance = parse_positive("--tolerance", v); }},
      {"--output", "FORMAT", "text (default), csv or json",
       [&](auto v) {
         static constexpr std::string_view kNames[] = {"text", "csv", "json"};
         o.report = static_cast<ReportFormat>(parse_choice("--output", v, kNames));
       }},
      {"--info", "", "list what this build has and what this machine can run", [&](auto) { o.wants_info = true; }},
      {"--help", "", "this text", [&](auto) { o.wants_help = true; }},
  };
}

std::vector<Option> option_table(Parsed& parsed) {
  Options& o = parsed.options;
  std::vector<Option> table = mode_rows(parsed);
  for (const auto& rows :
       {shape_rows(o), cache_rows(parsed), score_rows(o), data_rows(o), execution_rows(parsed), measurement_rows(o)})
    table.insert(table.end(), rows.begin(), rows.end());
  return table;
}

void join_formats(Parsed& p) {
  if (!p.k_format && !p.v_format) return;
  if (!p.options.sources.empty()) throw UsageError("--k-format and --v-format must not be given with --kv-format");
  if (!p.k_format || !p.v_format) throw UsageError("--k-format and --v-format must be given together");
  const KvPair pair{*p.k_format, *p.v_format};
  if (!quantattn::is_kv_pair(pair))
    fail_usage("--k-format and --v-format", "a pair of the format table (" + pair_names() + ")", quantattn::name(pair));
  p.options.sources = {pair};
}

void choose_mode(Parsed& p) {
  Options& o = p.options;
  o.mode = p.mode.value_or(Mode::kDecode);
  if (p.prefill_percent && o.mode != Mode::kHybrid) throw UsageError("--prefill-fraction needs --mode hybrid");
  o.prefill_percent = p.prefill_percent.value_or(o.prefill_percent);
  if (o.mode == Mode::kDecode && !o.is_causal)
    throw UsageError("--causal must be on with --mode decode, which is causal, got 'off'");
  if (o.mode == Mode::kDecode && o.seq_q && (o.seq_q->kind != LengthSpec::Kind::kFixed || o.seq_q->num_sequences() > 0))
    throw UsageError("--seq-q must be one number with --mode decode, got lengths that differ");
  if (o.mode == Mode::kHybrid && o.seq_q && o.prefill_percent == 0)
    throw UsageError("--seq-q is of sequences that prefill, got --prefill-fraction 0");
}

// Where a run happens that names no device.
quantattn::Device preferred_device(const Options& o) {
  for (const quantattn::KernelInfo& row : quantattn::built_decode_kernels())
    if (row.variant == o.kernel && row.backend == "cpu") return {};
  if (o.num_threads > 0) return {};
  for (const quantattn::BackendInfo& backend : quantattn::built_backends())
    if (backend.device == quantattn::DeviceKind::kCuda && backend.num_devices > 0) return {quantattn::DeviceKind::kCuda, 0};
  return {};
}

// An option that no run would use is a mistake.
void require_use_of_scale(std::string_view who, const ScaleSpec& spec, const std::vector<KvSource>& sources,
                          KvFormat KvPair::* side) {
  if (!spec.granularity && spec.file.empty()) return;
  for (KvSource source : sources)
    if (source && quantattn::info((*source).*side).has_scale) return;
  throw UsageError(std::string(who) + " must not be given for formats without scales, got " + name(sources.front()));
}

void require_use_of_cache(const Options& o) {
  for (KvSource source : o.sources) {
    if (!source && o.mode != Mode::kPrefill) fail_usage("--kv-format", "of a cache except with --mode prefill", name(source));
    if (source) return;
  }
  for (const auto& [who, is_given] : {std::pair<std::string_view, bool>{"--page-size", o.page_size > 0},
                                      {"--layout", o.is_hnd},
                                      {"--num-splits", o.num_splits > 0},
                                      {"--batch-invariant", o.is_batch_invariant}})
    if (is_given) throw UsageError(std::string(who) + " needs a cache, so --kv-format must name one, got fresh");
}

}  // namespace

std::string name(KvSource source) { return std::string(source ? quantattn::name(*source) : kFreshName); }

Options parse_command_line(std::span<const std::string_view> arguments) {
  Parsed parsed;
  parse_options(arguments, option_table(parsed));
  if (parsed.options.wants_help) return parsed.options;
  join_formats(parsed);
  choose_mode(parsed);
  Options& o = parsed.options;
  if (o.sources.empty())
    o.sources = {o.mode == Mode::kPrefill ? KvSource() : KvSource(KvPair{KvFormat::kInt8, KvFormat::kInt8})};
  require_use_of_cache(o);
  require_use_of_scale("--k-scale", o.k_scale, o.sources, &KvPair::k);
  require_use_of_scale("--v-scale", o.v_scale, o.sources, &KvPair::v);
  o.device = parsed.device ? *parsed.device : preferred_device(o);
  return parsed.options;
}

std::string help_text() {
  Parsed parsed;
  return "Usage: sample_runner [OPTION]...\n"
         "Runs attention over a quantised cache, or over fresh K and V, and checks the result against float64.\n"
         "Exit status: 0 fine, 1 mismatch, 2 bad usage or input, 3 unsupported combination or device error.\n" +
         describe(option_table(parsed));
}

}  // namespace sample_runner
