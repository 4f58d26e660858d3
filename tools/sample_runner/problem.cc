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

constexpr int kDefaultBatchSize = 8, kDefaultSeqK = 1024, kDefaultHeads = 32, kDefaultHeadDim = 128;

// Streams of random numbers: each tensor has its own.
enum class Stream : uint64_t { kQ, kK, kV, kSeqK, kSeqStarts };
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

void resolve_sizes(Problem& p, const Options& o, Loaded& files) {
  if (files.q && files.q->shape.size() == 3) files.q->shape.insert(files.q->shape.begin() + 1, 1);  // [B, Hq, D]
  const int listed = o.seq_k ? o.seq_k->num_sequences() : 0;
  p.batch_size = resolve("--batch-size", o.batch_size, {&files.q, &files.k, &files.v}, 0, listed ? listed : kDefaultBatchSize);
  p.num_q_tokens = resolve("--seq-q", o.seq_q, {&files.q}, 1, 1);
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
  for (double tokens : {static_cast<double>(p.max_seq_len()), static_cast<double>(p.num_q_tokens)})
    if (tokens * p.batch_size * p.num_q_heads * p.head_dim > 0x1p44)
      throw UsageError("the batch must hold at most 2^44 elements of q and of K, got more");
}

std::vector<std::byte> make_q(const Problem& p, const Options& o, std::optional<Tensor> file) {
  const int64_t num_elements = p.num_q_rows() * p.head_dim;
  std::vector<std::byte> q(static_cast<size_t>(num_elements * quantattn::bytes_of(p.q_dtype)));
  std::vector<float> values(static_cast<size_t>(num_elements));
  if (file) {
    require_shape(*file, {p.batch_size, p.num_q_tokens, p.num_q_heads, p.head_dim}, o.q_file);
    const RowSource source(std::move(*file), o.q_file);
    if (source.holds_codes())
      throw UsageError(o.q_file + ": q must be float32, float16 or bfloat16, got " + std::string(name(source.type())));
    for (int b = 0; b < p.batch_size; ++b) source.read(b, 0, p.num_q_tokens, values.data() + b * (num_elements / p.batch_size));
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

Problem make_problem(const Options& o) {
  Loaded files{load(o.q_file, o), load(o.k_file, o), load(o.v_file, o)};
  Problem p;
  resolve_sizes(p, o, files);
  p.q_dtype = o.q_dtype;
  p.q = make_q(p, o, std::move(files.q));
  p.k = make_rows(p, o, std::move(files.k), o.k_file, Stream::kK);
  p.v = make_rows(p, o, std::move(files.v), o.v_file, Stream::kV);
  p.sm_scale = o.sm_scale.value_or(1.f / std::sqrt(static_cast<float>(p.head_dim)));
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
