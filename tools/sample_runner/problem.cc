#include "problem.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "number_types.h"
#include "option_parser.h"
#include "quantattn/alibi.h"
#include "random_rows.h"

namespace sample_runner {
namespace {

constexpr int kDefaultBatchSize = 8, kDefaultPrefillBatchSize = 1, kDefaultSeqK = 1024, kDefaultHeads = 32,
              kDefaultHeadDim = 128;

// Streams of random numbers: each tensor has its own.
enum class Stream : uint64_t { kQ, kK, kV, kSeqK, kSeqStarts, kSeqQ };
uint64_t stream_seed(const Options& options, Stream stream) { return mix(options.seed, static_cast<uint64_t>(stream)); }

struct Loaded {
  std::optional<Tensor> q, k, v;
};

std::optional<Tensor> load(const std::string& path, const Options& options) {
  if (path.empty()) return std::nullopt;
  return read_tensor(path, options.file_type);
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return std::string("[").append(text).append("]");
}

// One size of the problem: a file that has a shape fixes it, then the command line, then the default.
int resolve(std::string_view option, std::optional<int> given, std::initializer_list<const std::optional<Tensor>*> files,
            size_t axis, int otherwise) {
  std::optional<int64_t> from_file;
  for (const std::optional<Tensor>* file : files) {
    if (!*file || (*file)->shape.size() != 4) continue;
    const int64_t size = (*file)->shape[axis];
    if (size > std::numeric_limits<int>::max()) fail_usage(option, "below 2^31", std::to_string(size));
    if (from_file && *from_file != size)
      throw UsageError("the loaded files disagree: axis " + std::to_string(axis) + " has " + std::to_string(*from_file) +
                       " and " + std::to_string(size) + " elements");
    from_file = size;
  }
  if (from_file && given && *given != *from_file)
    fail_usage(option, std::to_string(*from_file) + " as the loaded file's shape says", std::to_string(*given));
  return from_file ? static_cast<int>(*from_file) : given.value_or(otherwise);
}

// Gives a raw file its shape; a .npy file must have it.
void require_shape(Tensor& tensor, const std::vector<int64_t>& shape, const std::string& path) {
  int64_t num_elements = 1;
  for (int64_t size : shape) num_elements *= size;
  if (tensor.shape.size() == 1 && tensor.shape[0] == num_elements) tensor.shape = shape;
  if (tensor.shape != shape)
    throw UsageError(path + ": shape must be " + shape_text(shape) + ", got " + shape_text(tensor.shape));
}

std::vector<float> per_head(std::string_view option, const PerHeadSpec& spec, std::initializer_list<int64_t> allowed_sizes) {
  const auto size = static_cast<int64_t>(spec.values.size());
  if (std::ranges::find(allowed_sizes, size) != allowed_sizes.end()) return spec.values;
  std::string sizes;
  for (int64_t allowed : allowed_sizes) sizes += (sizes.empty() ? "" : " or ") + std::to_string(allowed);
  throw UsageError(std::string(option) + " must have " + sizes + " values, got " + std::to_string(size));
}

std::vector<int32_t> lengths(std::string_view option, const LengthSpec& spec, const Problem& problem, uint64_t seed) {
  if (spec.num_sequences() != 0 && spec.num_sequences() != problem.batch_size)
    throw UsageError(std::string(option) + " must have 1 or " + std::to_string(problem.batch_size) +
                     " lengths, as many as there are sequences, got " + std::to_string(spec.num_sequences()));
  return draw_lengths(spec, problem.batch_size, seed);
}

// A tenth of ten sequences that prefill is every tenth, not the first one: a batch mixes both kinds.
std::vector<bool> choose_prefills(const Problem& p, const Options& o) {
  std::vector<bool> is_prefill(static_cast<size_t>(p.batch_size), o.mode == Mode::kPrefill);
  if (o.mode != Mode::kHybrid) return is_prefill;
  const int64_t num_prefills = (int64_t{o.prefill_percent} * p.batch_size + 50) / 100;
  for (int64_t b = 0; b < p.batch_size; ++b)
    is_prefill[static_cast<size_t>(b)] = (b + 1) * num_prefills / p.batch_size > b * num_prefills / p.batch_size;
  return is_prefill;
}

// [B] query tokens: of a sequence that prefills its whole prompt, of the others one, unless the file or the command line
// says otherwise.
std::vector<int32_t> query_lengths(const Problem& p, const Options& o, const std::optional<Tensor>& q_file) {
  constexpr int32_t kNoLimit = std::numeric_limits<int32_t>::max();
  const bool has_shape = q_file && q_file->shape.size() == 4;
  const auto most = has_shape ? static_cast<int32_t>(std::min<int64_t>(q_file->shape[1], kNoLimit)) : kNoLimit;
  std::vector<int32_t> counts(static_cast<size_t>(p.batch_size), has_shape ? most : 1);
  std::vector<int32_t> given;
  if (o.seq_q) given = lengths("--seq-q", *o.seq_q, p, stream_seed(o, Stream::kSeqQ));
  for (size_t b = 0; b < counts.size(); ++b) {
    if (p.is_prefill[b] && !has_shape) counts[b] = p.seq_lens[b];
    if (o.mode == Mode::kHybrid && !p.is_prefill[b])
      counts[b] = 1;
    else if (o.seq_q)
      counts[b] = given[b];
    if (counts[b] > most)
      fail_usage("--seq-q", "at most the " + std::to_string(most) + " tokens of the loaded file", std::to_string(counts[b]));
  }
  return counts;
}

void place_queries(Problem& p, const std::vector<int32_t>& counts) {
  int64_t total = 0;
  p.cu_seqlens_q = {0};
  for (int32_t count : counts) {
    total += count;
    if (total * p.num_q_heads * p.head_dim > int64_t{1} << 44 || total > std::numeric_limits<int32_t>::max())
      throw UsageError("the batch must hold at most 2^31 - 1 query tokens and 2^44 elements of q, got more");
    p.cu_seqlens_q.push_back(static_cast<int32_t>(total));
  }
}

void resolve_sizes(Problem& p, const Options& o, Loaded& files) {
  if (files.q && files.q->shape.size() == 3) files.q->shape.insert(files.q->shape.begin() + 1, 1);  // [B, Hq, D]
  const int listed = o.seq_k ? o.seq_k->num_sequences() : 0;
  const int unlisted = o.mode == Mode::kPrefill ? kDefaultPrefillBatchSize : kDefaultBatchSize;
  p.batch_size = resolve("--batch-size", o.batch_size, {&files.q, &files.k, &files.v}, 0, listed ? listed : unlisted);
  p.head_dim = resolve("--head-dim", o.head_dim, {&files.q, &files.k, &files.v}, 3, kDefaultHeadDim);
  p.num_q_heads = resolve("--num-q-heads", o.num_q_heads, {&files.q}, 2, kDefaultHeads);
  p.num_kv_heads = resolve("--num-kv-heads", o.num_kv_heads, {&files.k, &files.v}, 2, p.num_q_heads);
  if (p.num_kv_heads < 1 || p.num_q_heads < 1 || p.num_q_heads % p.num_kv_heads != 0)
    throw UsageError("--num-q-heads must be a multiple of --num-kv-heads, got " + std::to_string(p.num_q_heads) + " and " +
                     std::to_string(p.num_kv_heads));
  const int most = resolve("--seq-k", std::nullopt, {&files.k, &files.v}, 1, std::numeric_limits<int>::max());
  LengthSpec all_of_the_file;
  all_of_the_file.values = {most == std::numeric_limits<int>::max() ? kDefaultSeqK : most};
  p.seq_lens = lengths("--seq-k", o.seq_k.value_or(all_of_the_file), p, stream_seed(o, Stream::kSeqK));
  if (p.max_seq_len() > most)
    fail_usage("--seq-k", "at most the " + std::to_string(most) + " tokens of the loaded file",
               std::to_string(p.max_seq_len()));
  if (o.seq_starts) p.seq_starts = lengths("--seq-starts", *o.seq_starts, p, stream_seed(o, Stream::kSeqStarts));
  if (static_cast<double>(p.max_seq_len()) * p.batch_size * p.num_q_heads * p.head_dim > 0x1p44)
    throw UsageError("the batch must hold at most 2^44 elements of K, got more");
  p.is_prefill = choose_prefills(p, o);
  place_queries(p, query_lengths(p, o, files.q));
}

std::vector<std::byte> make_q(const Problem& p, const Options& o, std::optional<Tensor> file) {
  const int64_t num_elements = p.num_q_rows() * p.head_dim;
  std::vector<std::byte> q(static_cast<size_t>(num_elements * quantattn::bytes_of(p.q_dtype)));
  std::vector<float> values(static_cast<size_t>(num_elements));
  if (file) {
    int64_t most = 0;
    for (int b = 0; b < p.batch_size; ++b) most = std::max<int64_t>(most, p.num_q_tokens_of(b));
    if (file->shape.size() == 4) most = file->shape[1];
    require_shape(*file, {p.batch_size, most, p.num_q_heads, p.head_dim}, o.q_file);
    const RowSource source(std::move(*file), o.q_file);
    if (source.holds_codes())
      throw UsageError(o.q_file + ": q must be float32, float16 or bfloat16, got " + std::string(name(source.type())));
    for (int b = 0; b < p.batch_size; ++b)  // the last tokens: a query token's position counts from the end of the keys
      source.read(b, most - p.num_q_tokens_of(b), p.num_q_tokens_of(b), values.data() + p.row(b, 0, 0) * p.head_dim);
  } else {
    fill_normal(stream_seed(o, Stream::kQ), values);
  }
  for (int64_t i = 0; i < num_elements; ++i) encode(p.q_dtype, values[static_cast<size_t>(i)], q.data(), i);
  return q;
}

RowSource make_rows(const Problem& p, const Options& o, std::optional<Tensor> file, const std::string& path, Stream stream) {
  if (!file) return RowSource(stream_seed(o, stream), p.num_kv_heads, p.head_dim);
  const bool has_length = file->shape.size() == 4;
  require_shape(*file, {p.batch_size, has_length ? file->shape[1] : p.max_seq_len(), p.num_kv_heads, p.head_dim}, path);
  return RowSource(std::move(*file), path);
}

}  // namespace

int Problem::max_seq_len() const { return seq_lens.empty() ? 0 : *std::ranges::max_element(seq_lens); }

VisibleKeys visible_keys(const Problem& p, int b, int64_t token) {
  const int64_t length = p.seq_lens[static_cast<size_t>(b)], position = length - p.num_q_tokens_of(b) + token;
  const int64_t start = p.seq_starts.empty() ? 0 : p.seq_starts[static_cast<size_t>(b)];
  const int64_t window_start = p.sliding_window > 0 ? position - p.sliding_window + 1 : 0;
  return {position, std::max({start, window_start, int64_t{0}}), p.is_causal ? position + 1 : length};
}

Problem make_problem(const Options& o) {
  Loaded files{load(o.q_file, o), load(o.k_file, o), load(o.v_file, o)};
  Problem p;
  resolve_sizes(p, o, files);
  p.q_dtype = o.q_dtype;
  p.q = make_q(p, o, std::move(files.q));
  p.k = make_rows(p, o, std::move(files.k), o.k_file, Stream::kK);
  p.v = make_rows(p, o, std::move(files.v), o.v_file, Stream::kV);
  p.sm_scale = o.sm_scale.value_or(1.f / std::sqrt(static_cast<float>(p.head_dim)));
  p.is_causal = o.is_causal;
  p.sliding_window = o.sliding_window;
  p.logits_soft_cap = o.logits_soft_cap;
  if (o.alibi.kind == PerHeadSpec::Kind::kStandard) p.alibi_slopes = quantattn::get_alibi_slopes(p.num_q_heads);
  if (o.alibi.kind == PerHeadSpec::Kind::kValues)
    p.alibi_slopes = per_head("--alibi", o.alibi, {p.num_q_heads, int64_t{p.batch_size} * p.num_q_heads});
  if (o.sinks.kind == PerHeadSpec::Kind::kValues) p.sinks = per_head("--sinks", o.sinks, {1, p.num_q_heads});
  if (p.sinks.size() == 1) p.sinks.resize(static_cast<size_t>(p.num_q_heads), p.sinks[0]);
  return p;
}

}  // namespace sample_runner
