// decode_attention against the float64 reference, on every variant that this machine runs.
#include "check.h"
#include "problem.h"

using namespace quantattn;
using namespace quantattn_test;

namespace {

void check_on_every_variant(const Shape& shape, int num_splits = 0, bool batch_invariant = false) {
  Problem problem(shape);
  problem.params.num_splits = num_splits;
  problem.params.batch_invariant = batch_invariant;
  for (const std::string& variant : cpu_variants()) problem.check({.num_threads = 2, .kernel = variant});
}

void every_pair_and_granularity() {
  for (KvPair pair : kv_pairs()) {
    for (auto granularity : {ScaleGranularity::kTokenHead, ScaleGranularity::kHead, ScaleGranularity::kTensor})
      for (bool has_offset : {false, true})
        check_on_every_variant({.format = pair, .granularity = granularity, .has_sinks = has_offset, .has_offset = has_offset});
    check_on_every_variant({.format = pair,
                            .seq_lens = {70, 3, 0, 33},
                            .num_q_tokens = 2,
                            .group = 3,
                            .sliding_window = 21,
                            .logits_soft_cap = 5.f,
                            .has_alibi = true,
                            .has_sinks = true,
                            .has_starts = true,
                            .has_offset = true});
  }
}

void every_head_dim() {
  for (int head_dim = 32; head_dim <= 256; head_dim += 8)
    for (KvFormat format : {KvFormat::kFp16, KvFormat::kInt8, KvFormat::kFp8E4M3})
      check_on_every_variant({.format = {format, format}, .seq_lens = {5, 17, 0}, .num_kv_heads = 1, .head_dim = head_dim});
}

void groups_tokens_and_pages() {
  for (KvFormat format : {KvFormat::kBf16, KvFormat::kInt8, KvFormat::kFp8E5M2}) {
    for (int group : {1, 5, 7, 12, 16, 71, 128})
      check_on_every_variant({.format = {format, format}, .seq_lens = {9, 20, 1}, .num_kv_heads = 1, .group = group});
    for (int num_q_tokens : {2, 7, 16})
      check_on_every_variant({.format = {format, format}, .seq_lens = {9, 40, 0}, .num_q_tokens = num_q_tokens});
    for (int page_size : {1, 3, 7, 64, 256})
      check_on_every_variant({.format = {format, format}, .seq_lens = {65, 130, 2}, .page_size = page_size});
  }
}

void splits() {
  for (KvFormat format : {KvFormat::kFp16, KvFormat::kInt8, KvFormat::kFp8E4M3}) {
    const Shape shape = {.format = {format, format}, .seq_lens = {600, 0, 1, 130}, .has_sinks = true};
    for (int num_splits : {1, 2, 3, 9, 64, 1000}) check_on_every_variant(shape, num_splits);
    check_on_every_variant(shape, 0, true);
  }
  // More parts than keys: parts without keys may be the ones that finish a row.
  check_on_every_variant({.seq_lens = {10, 130, 0}, .has_sinks = true, .has_offset = true}, 7);
}

}  // namespace

int main() {
  every_pair_and_granularity();
  every_head_dim();
  groups_tokens_and_pages();
  splits();
  return finish("decode_test");
}
