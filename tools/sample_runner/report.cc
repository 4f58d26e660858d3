#include "report.h"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <numeric>
#include <ostream>
#include <sstream>
#include <variant>

namespace sample_runner {
namespace {

// One column. The text report groups by heading and leaves out what is empty.
struct Field {
  std::string_view name;
  std::variant<std::monostate, std::string, int64_t, double, bool> value;
  std::string_view heading = {};  // starts a group
};
using Fields = std::vector<Field>;

double median(std::vector<double> values) {
  std::ranges::sort(values);
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

struct LengthFacts {
  int64_t least = 0, most = 0, total = 0;
};
LengthFacts facts_of(const std::vector<int32_t>& lengths) {
  if (lengths.empty()) return {};
  return {*std::ranges::min_element(lengths), *std::ranges::max_element(lengths),
          std::accumulate(lengths.begin(), lengths.end(), int64_t{0})};
}

void add_problem(const Problem& p, KvSource source, const Options& o, Fields& fields) {
  std::vector<int32_t> query_lengths;
  for (int b = 0; b < p.batch_size; ++b) query_lengths.push_back(p.num_q_tokens_of(b));
  const LengthFacts seq_q = facts_of(query_lengths), seq_k = facts_of(p.seq_lens);
  const int64_t num_prefills = std::ranges::count(p.is_prefill, true);
  fields.insert(fields.end(), {
                                  {"mode", std::string(kModeNames[static_cast<size_t>(o.mode)]), "problem"},
                                  {"kv_format", name(source)},
                                  {"batch_size", int64_t{p.batch_size}},
                                  {"prefill_sequences", num_prefills},
                                  {"seq_q_min", seq_q.least},
                                  {"seq_q_max", seq_q.most},
                                  {"seq_q_total", seq_q.total},
                                  {"seq_k_min", seq_k.least},
                                  {"seq_k_max", seq_k.most},
                                  {"seq_k_total", seq_k.total},
                                  {"num_q_heads", int64_t{p.num_q_heads}},
                                  {"num_kv_heads", int64_t{p.num_kv_heads}},
                                  {"head_dim", int64_t{p.head_dim}},
                                  {"q_dtype", std::string(quantattn::name(p.q_dtype))},
                                  {"causal", p.is_causal},
                                  {"sm_scale", double{p.sm_scale}},
                                  {"has_alibi", !p.alibi_slopes.empty()},
                                  {"sliding_window", int64_t{p.sliding_window}},
                                  {"logits_soft_cap", double{p.logits_soft_cap}},
                                  {"has_sinks", !p.sinks.empty()},
                                  {"has_seq_starts", !p.seq_starts.empty()},
                                  {"seed", static_cast<int64_t>(o.seed)},
                              });
}

void add_cache(const Options& o, const Outcome& outcome, Fields& fields) {
  const CacheSize size = outcome.size.value_or(CacheSize{});
  const bool has_size = outcome.size.has_value();
  const auto when = [&](auto value) { return has_size ? Field{{}, value}.value : Field{}.value; };
  const double saving = size.num_bytes_as_fp16 > 0
                            ? 100. * (1 - static_cast<double>(size.num_bytes) / static_cast<double>(size.num_bytes_as_fp16))
                            : 0;
  fields.insert(fields.end(), {
                                  {"page_size", when(int64_t{o.page_size}), "cache"},
                                  {"layout", when(std::string(o.is_hnd ? "HND" : "NHD"))},
                                  {"k_scale", when(outcome.k_scale)},
                                  {"v_scale", when(outcome.v_scale)},
                                  {"cache_bytes", when(size.num_bytes)},
                                  {"fp16_cache_bytes", when(size.num_bytes_as_fp16)},
                                  {"saving_percent", when(saving)},
                                  {"bits_per_element", when(size.bits_per_element)},
                              });
}

// 1e9 bytes or 1e12 operations per second.
double gigabytes_per_second(const Work& work, double ms) {
  return ms > 0 ? static_cast<double>(work.num_bytes_read) / ms / 1e6 : 0;
}
double teraflop_per_second(const Work& work, double ms) { return ms > 0 ? static_cast<double>(work.num_flop) / ms / 1e9 : 0; }

void add_step(const Options& o, const Outcome& outcome, Fields& fields) {
  const bool has_step = outcome.attention.has_value();
  const AttentionResult none{.out = {}, .lse = {}, .plan = {}, .step_ms = {0.}, .parts = {}};
  const AttentionResult& step = has_step ? *outcome.attention : none;
  const auto when = [&](auto value) { return has_step ? Field{{}, value}.value : Field{}.value; };
  const auto if_split = [](std::optional<int> value) { return value ? Field{{}, int64_t{*value}}.value : Field{}.value; };
  const double median_ms = median(step.step_ms);
  fields.insert(fields.end(), {
                                  {"backend", when(step.plan.backend), "call"},
                                  {"kernel", when(step.plan.variant)},
                                  {"threads", int64_t{o.num_threads}},
                                  {"num_splits", if_split(step.plan.num_splits)},
                                  {"split_size", if_split(step.plan.split_size)},
                                  {"batch_invariant", o.is_batch_invariant},
                                  {"workspace_bytes", when(step.plan.workspace_bytes)},
                                  {"warmup_iterations", int64_t{o.warmup_iterations}},
                                  {"profiling_iterations", int64_t{o.profiling_iterations}},
                                  {"flush_mib", int64_t{o.flush_mib}},
                                  {"median_ms", when(median_ms)},
                                  {"min_ms", when(*std::ranges::min_element(step.step_ms))},
                                  {"bytes_read", when(outcome.work.num_bytes_read)},
                                  {"gb_per_s", when(gigabytes_per_second(outcome.work, median_ms))},
                                  {"flop", when(outcome.work.num_flop)},
                                  {"tflop_per_s", when(teraflop_per_second(outcome.work, median_ms))},
                              });
}

void add_parts(const Outcome& outcome, Fields& fields) {
  const bool has_parts = outcome.attention && outcome.attention->parts;
  const PartTimes parts = has_parts ? *outcome.attention->parts : PartTimes{};
  const bool has_prefill = !parts.prefill_ms.empty(), has_decode = !parts.decode_ms.empty();
  const auto when = [](bool is_known, double value) { return is_known ? Field{{}, value}.value : Field{}.value; };
  const double prefill_ms = has_prefill ? median(parts.prefill_ms) : 0, decode_ms = has_decode ? median(parts.decode_ms) : 0;
  fields.insert(fields.end(),
                {
                    {"prefill_ms", when(has_prefill, prefill_ms), "the batch's two kinds of sequences, each in its own call"},
                    {"prefill_tflop_per_s", when(has_prefill, teraflop_per_second(outcome.prefill_work, prefill_ms))},
                    {"decode_ms", when(has_decode, decode_ms)},
                    {"decode_gb_per_s", when(has_decode, gigabytes_per_second(outcome.decode_work, decode_ms))},
                    {"sum_of_parts_ms", when(has_parts, prefill_ms + decode_ms)},
                });
}

void add_check(const Options& o, const Outcome& outcome, Fields& fields) {
  static constexpr std::string_view kStatusNames[] = {"unchecked", "right", "mismatch", "unsupported"};
  const bool has_check = outcome.comparison.has_value(), has_codec = outcome.k_codec.has_value();
  const Comparison error = outcome.comparison.value_or(Comparison{});
  const auto when = [](bool is_known, auto value) { return is_known ? Field{{}, value}.value : Field{}.value; };
  std::string messages;
  for (const std::string& message : outcome.messages) messages += (messages.empty() ? "" : "; ") + message;
  fields.insert(
      fields.end(),
      {
          {"max_error", when(has_check, error.max_error), "check against float64 over the K and V that the kernel was given"},
          {"mean_error", when(has_check, error.mean_error)},
          {"relative_l2", when(has_check, error.relative_l2)},
          {"worst_row_relative_l2", when(has_check, error.worst_row_relative_l2)},
          {"tolerance", when(has_check, tolerance_of(o))},
          {"max_lse_error", when(has_check, error.max_lse_error)},
          {"reproducible", when(has_check, has_check && outcome.attention->is_reproducible)},
          {"k_format_error", when(has_codec, has_codec ? outcome.k_codec->relative_l2 : 0), "error of the format, relative L2"},
          {"v_format_error", when(has_codec, has_codec ? outcome.v_codec->relative_l2 : 0)},
          {"output_format_error", when(has_codec, outcome.output_format_error.value_or(0))},
          {"status", std::string(kStatusNames[static_cast<size_t>(outcome.status)]), "result"},
          {"message", messages.empty() ? Field{}.value : Field{{}, messages}.value},
      });
}

std::string number_text(double value) {
  std::ostringstream text;
  text << std::setprecision(6) << value;
  return text.str();
}

// Quotes doubled as CSV wants, or escaped as JSON wants. Messages are printable ASCII.
std::string quoted(const std::string& text, std::string_view escape) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || (c == '\\' && escape == "\\")) result += escape;
    result += c;
  }
  return result + "\"";
}

std::string plain_text(const Field& field) {
  if (const auto* text = std::get_if<std::string>(&field.value)) return *text;
  if (const auto* number = std::get_if<int64_t>(&field.value)) return std::to_string(*number);
  if (const auto* number = std::get_if<double>(&field.value)) return number_text(*number);
  if (const auto* is_true = std::get_if<bool>(&field.value)) return *is_true ? "true" : "false";
  return {};
}

void write_text(const Fields& fields, std::ostream& stream) {
  std::string_view heading;  // not yet written: a group without values has none
  for (const Field& field : fields) {
    if (!field.heading.empty()) heading = field.heading;
    if (std::holds_alternative<std::monostate>(field.value)) continue;
    if (!heading.empty()) stream << heading << '\n';
    heading = {};
    stream << "  " << std::left << std::setw(24) << field.name << plain_text(field) << '\n';
  }
}

void write_csv(const Fields& fields, bool has_header, std::ostream& stream) {
  std::string header, row;
  for (const Field& field : fields) {
    const std::string comma = header.empty() ? "" : ",";
    header += comma + std::string(field.name);
    const std::string text = plain_text(field);
    row += comma + (text.find_first_of(",\"") == std::string::npos ? text : quoted(text, "\""));
  }
  if (has_header) stream << header << '\n';
  stream << row << '\n';
}

void write_json(const Fields& fields, bool is_first, std::ostream& stream) {
  stream << (is_first ? "[\n" : ",\n") << " {";
  std::string separator;
  for (const Field& field : fields) {
    const auto* number = std::get_if<double>(&field.value);
    const bool is_null = std::holds_alternative<std::monostate>(field.value) || (number != nullptr && !std::isfinite(*number));
    const bool is_text = std::holds_alternative<std::string>(field.value);
    const std::string text = plain_text(field);
    stream << separator << quoted(std::string(field.name), "\\") << ": "
           << (is_null   ? "null"
               : is_text ? quoted(text, "\\")
                         : text);
    separator = ", ";
  }
  stream << '}';
}

}  // namespace

void ReportWriter::write(const Problem& problem, KvSource source, const Options& options, const Outcome& outcome) {
  Fields fields;
  add_problem(problem, source, options, fields);
  add_cache(options, outcome, fields);
  add_step(options, outcome, fields);
  add_parts(outcome, fields);
  add_check(options, outcome, fields);
  const bool is_first = num_written_++ == 0;
  switch (format_) {
    case ReportFormat::kText:
      stream_ << (is_first ? "" : "\n");
      write_text(fields, stream_);
      break;
    case ReportFormat::kCsv:
      write_csv(fields, is_first, stream_);
      break;
    case ReportFormat::kJson:
      write_json(fields, is_first, stream_);
      break;
  }
  stream_ << std::flush;
}

void ReportWriter::finish() {
  if (format_ == ReportFormat::kJson) stream_ << (num_written_ == 0 ? "[]\n" : "\n]\n");
}

}  // namespace sample_runner
