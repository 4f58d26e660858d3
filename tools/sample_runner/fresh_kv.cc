#include "fresh_kv.h"

#include <numeric>

#include "number_types.h"
#include "option_parser.h"

namespace sample_runner {
namespace {

std::vector<int32_t> first_keys(const Problem& p) {
  const int64_t total = std::accumulate(p.seq_lens.begin(), p.seq_lens.end(), int64_t{0});
  if (total > std::numeric_limits<int32_t>::max())
    throw UsageError("a batch of fresh K and V must have at most 2^31 - 1 tokens, got " + std::to_string(total));
  std::vector<int32_t> firsts{0};
  for (int32_t length : p.seq_lens) firsts.push_back(firsts.back() + length);
  return firsts;
}

}  // namespace

FreshKv::FreshKv(const Problem& p, DeviceMemory& memory)
    : dtype_(p.q_dtype), num_heads_(p.num_kv_heads), head_dim_(p.head_dim), first_keys_(first_keys(p)) {
  if (p.k.holds_codes() || p.v.holds_codes())
    throw UsageError("--load-k and --load-v must hold numbers for fresh K and V, got codes");
  k_ = make_half(p, p.k, memory);
  v_ = make_half(p, p.v, memory);
  cu_seqlens_k_ = Buffer::of<int32_t>(memory, first_keys_);
}

FreshKv::Half FreshKv::make_half(const Problem& p, const RowSource& rows, DeviceMemory& memory) const {
  const int64_t row_size = int64_t{num_heads_} * head_dim_;
  Half half;
  half.host.resize(static_cast<size_t>(num_tokens() * row_size * quantattn::bytes_of(dtype_)));
  std::vector<float> values;
  for (int b = 0; b < p.batch_size; ++b) {
    const int64_t length = p.seq_lens[static_cast<size_t>(b)], first = first_keys_[static_cast<size_t>(b)] * row_size;
    values.resize(static_cast<size_t>(length * row_size));
    rows.read(b, 0, length, values.data());
    for (size_t i = 0; i < values.size(); ++i) encode(dtype_, values[i], half.host.data(), first + static_cast<int64_t>(i));
  }
  half.device = Buffer::of<std::byte>(memory, half.host);
  return half;
}

quantattn::VectorArray FreshKv::array(Side side) const {
  const int64_t row_size = int64_t{num_heads_} * head_dim_;
  return {half(side).device.as<void>(), num_tokens() * row_size, row_size, head_dim_};
}

int64_t FreshKv::num_bytes_of_token() const { return 2 * int64_t{num_heads_} * head_dim_ * quantattn::bytes_of(dtype_); }

void FreshKv::read(Side side, int b, int head, int64_t length, std::vector<double>& rows) const {
  rows.clear();
  rows.reserve(static_cast<size_t>(length * head_dim_));
  for (int64_t t = 0; t < length; ++t) {
    const int64_t start = ((first_keys_[static_cast<size_t>(b)] + t) * num_heads_ + head) * head_dim_;
    for (int64_t d = 0; d < head_dim_; ++d) rows.push_back(decode(dtype_, half(side).host.data(), start + d));
  }
}

}  // namespace sample_runner
