// Bad arguments throw with who, the rule and the value; a missing kernel is Unsupported.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "ragged_problem.h"

using namespace quantattn;
using namespace quantattn_test;

namespace {

template <class Change>
void refused(const char* part, Change change) {
  Problem problem({});
  change(problem.params);
  CHECK_THROWS(plan_decode_attention(problem.params, {}), InvalidArgument, part);
}

void arguments_of_decode() {
  refused("decode_attention: num_q_heads must be a multiple of num_kv_heads, got 3 and 2", [](auto& p) { p.num_q_heads = 3; });
  refused("got 17", [](auto& p) { p.num_q_tokens = 17; });
  refused("batch_size must be at least 0, got -1", [](auto& p) { p.batch_size = -1; });
  refused("sm_scale must be finite", [](auto& p) { p.sm_scale = std::numeric_limits<float>::infinity(); });
  refused("sliding_window must be at least 1, got -1", [](auto& p) { p.sliding_window = -1; });
  refused("logits_soft_cap must be positive and finite", [](auto& p) { p.logits_soft_cap = NAN; });
  refused("num_splits must be at least 1, got -2", [](auto& p) { p.num_splits = -2; });
  refused("batch_invariant", [](auto& p) { p.num_splits = 2, p.batch_invariant = true; });
  refused("must not be null", [](auto& p) { p.q.data = nullptr; });
  refused("cache must be filled, got 0 KV heads and pages of 0 tokens", [](auto& p) { p.cache = {}; });
  int32_t lens[] = {5, -3, 7}, longer[] = {5, 0, 100000};
  std::vector<int32_t> table(30, 99);
  refused("seq_lens[1] must be in [0, ", [&](auto& p) { p.seq_lens.data = lens; });
  refused("got 100000", [&](auto& p) { p.seq_lens.data = longer; });
  refused("page_table[0, 0] must be in [0, ", [&](auto& p) { p.page_table.data = table.data(); });
}

template <class Change>
void prefill_refused(const char* part, Change change) {
  PrefillProblem problem({});
  change(problem.params);
  CHECK_THROWS(plan_prefill_attention(problem.params, {}), InvalidArgument, part);
}

template <class Change>
void hybrid_refused(const char* part, Change change) {
  HybridProblem problem({});
  change(problem.params);
  CHECK_THROWS(plan_hybrid_attention(problem.params, {}), InvalidArgument, part);
}

// Lengths of the default shape: {40, 0, 3, 1} query tokens, {40, 7, 70, 0} keys.
void arguments_of_prefill() {
  prefill_refused("prefill_attention: num_q_heads must be a multiple of num_kv_heads, got 3 and 2",
                  [](auto& p) { p.num_q_heads = 3; });
  prefill_refused("num_kv_heads must be at least 1, got 0", [](auto& p) { p.num_kv_heads = 0; });
  prefill_refused("batch_size must be at least 0, got -1", [](auto& p) { p.batch_size = -1; });
  prefill_refused("head_dim must be at least 1, got -8", [](auto& p) { p.head_dim = -8; });
  prefill_refused("q must have 0 to 2^31 - 1 tokens, got -1", [](auto& p) { p.num_q_tokens = -1; });
  prefill_refused("k must have 0 to 2^31 - 1 tokens, got 2147483648", [](auto& p) { p.num_k_tokens = int64_t{1} << 31; });
  prefill_refused("q must have no tokens for an empty batch, got 44", [](auto& p) { p.batch_size = 0; });
  prefill_refused("sm_scale must be finite", [](auto& p) { p.sm_scale = NAN; });
  prefill_refused("sliding_window must be at least 1, got -1", [](auto& p) { p.sliding_window = -1; });
  prefill_refused("logits_soft_cap must be positive and finite", [](auto& p) { p.logits_soft_cap = -1.f; });
  prefill_refused("cu_seqlens_q and cu_seqlens_k must not be null", [](auto& p) { p.cu_seqlens_k = {}; });
  prefill_refused("q and out must not be null", [](auto& p) { p.q.data = nullptr; });
  prefill_refused("k and v must not be null", [](auto& p) { p.v.data = nullptr; });
  prefill_refused("cu_seqlens_q must end at the number of tokens, 43, got 44", [](auto& p) { p.num_q_tokens = 43; });
  prefill_refused("cu_seqlens_k must end at the number of tokens, 118, got 117", [](auto& p) { p.num_k_tokens = 118; });
  int32_t late[] = {1, 40, 40, 43, 44}, falling[] = {0, 40, 39, 43, 44}, starts[] = {0, 0, -2, 0};
  prefill_refused("cu_seqlens_q must start at 0, got 1", [&](auto& p) { p.cu_seqlens_q = {late}; });
  prefill_refused("cu_seqlens_q must never decrease, got 40 and then 39", [&](auto& p) { p.cu_seqlens_q = {falling}; });
  prefill_refused("seq_starts[2] must be at least 0, got -2", [&](auto& p) { p.seq_starts = {starts}; });
}

void arguments_of_hybrid() {
  hybrid_refused("hybrid_attention: num_q_heads must be a multiple of num_kv_heads, got 3 and 2",
                 [](auto& p) { p.num_q_heads = 3; });
  hybrid_refused("cache must be filled", [](auto& p) { p.cache = {}; });
  hybrid_refused("the cache needs a page for each sequence", [](auto& p) { p.page_table = {}, p.cache.num_pages = 3; });
  hybrid_refused("num_splits must be at least 1, got -2", [](auto& p) { p.num_splits = -2; });
  hybrid_refused("batch_invariant", [](auto& p) { p.num_splits = 2, p.batch_invariant = true; });
  hybrid_refused("cu_seqlens_q and seq_lens must not be null", [](auto& p) { p.seq_lens = {}; });
  hybrid_refused("cu_seqlens_q must end at the number of tokens, 45, got 44", [](auto& p) { p.num_q_tokens = 45; });
  int32_t longer[] = {5, 0, 100000, 0};
  std::vector<int32_t> table(60, 99);
  hybrid_refused("seq_lens[2] must be in [0, ", [&](auto& p) { p.seq_lens = {longer}; });
  hybrid_refused("page_table[0, 0] must be in [0, ", [&](auto& p) { p.page_table.data = table.data(); });
}

// Nothing to compute: no pointer is needed.
void empty_calls() {
  PrefillParams prefill;
  prefill.num_q_heads = prefill.num_kv_heads = 1;
  prefill.head_dim = 64;
  prefill_attention(prefill, {}, plan_prefill_attention(prefill, {}), nullptr);
  const int32_t zeros[] = {0, 0, 0};
  prefill.batch_size = 2;
  prefill.cu_seqlens_q = prefill.cu_seqlens_k = {zeros};
  CHECK(plan_prefill_attention(prefill, {}).backend == "cpu", "two empty sequences");
}

void caches() {
  Problem problem({});
  KvCacheView cache = problem.params.cache;
  cache.page_size = 0;
  CHECK_THROWS(validate(cache, "me"), InvalidArgument, "me: page_size must be at least 1, got 0");
  cache = problem.params.cache;
  cache.v_scale = {};
  CHECK_THROWS(validate(cache, "me"), InvalidArgument, "me: v_scale must be given for kv_format int8, got none");
  cache = problem.params.cache;
  cache.format.v = KvFormat::kFp16;
  CHECK_THROWS(validate(cache, "me"), InvalidArgument, "me: kv_format must be a pair of the format table, got int8/fp16");
  cache = problem.params.cache;
  cache.k_codes.data = nullptr;
  CHECK_THROWS(validate(cache, "me"), InvalidArgument, "must not be null pointers");
}

void arguments_of_codecs() {
  std::vector<float> values(64);
  std::vector<uint8_t> codes(64);
  CodecParams params;
  params.format = KvFormat::kInt8;
  params.values.data = values.data();
  params.codes.data = codes.data();
  params.num_pages = 1;
  params.page_size = params.num_heads = 1;
  CHECK_THROWS(quantize_kv(params, {}), InvalidArgument, "quantize_kv: head_dim must be at least 1, got 0");
  params.head_dim = 64;
  CHECK_THROWS(quantize_kv(params, {}), InvalidArgument, "quantize_kv: scale must be given for kv_format int8, got none");
  params.scale.granularity = ScaleGranularity::kTokenHead;
  CHECK_THROWS(dequantize_kv(params, {}), InvalidArgument, "dequantize_kv: scale must not be a null pointer");
  params.codes.data = nullptr;
  CHECK_THROWS(quantize_kv(params, {}), InvalidArgument, "quantize_kv: values and codes must not be null pointers");
}

void missing_kernels() {
  Problem problem({.head_dim = 40});
  problem.params.cache.head_dim = 36;
  CHECK_THROWS(plan_decode_attention(problem.params, {}), Unsupported, "no kernel for head_dim 36 and kv_format int8");
  Problem other({});
  CHECK_THROWS(plan_decode_attention(other.params, {.kernel = "abacus"}), Unsupported, "with kernel abacus");
  CHECK(!supports_decode(DeviceKind::kCpu, {KvFormat::kInt8, KvFormat::kInt8}, 36, 1), "head_dim 36");
  CHECK(!supports_decode(DeviceKind::kCpu, {KvFormat::kInt8, KvFormat::kInt8}, 64, 17), "17 query tokens");
  CHECK(supports_decode(DeviceKind::kCpu, {KvFormat::kInt8, KvFormat::kInt8}, 64, 16), "16 query tokens");
}

void missing_kernels_of_ragged_batches() {
  PrefillProblem prefill({});
  CHECK_THROWS(plan_prefill_attention(prefill.params, {.kernel = "abacus"}), Unsupported, "with kernel abacus");
  prefill.params.head_dim = 36;
  CHECK_THROWS(plan_prefill_attention(prefill.params, {}), Unsupported, "no kernel for head_dim 36 and dtype float32");
  HybridProblem hybrid({});
  CHECK_THROWS(plan_hybrid_attention(hybrid.params, {.kernel = "abacus"}), Unsupported, "with kernel abacus");
  CHECK(supports_prefill(DeviceKind::kCpu, DType::kBFloat16, 256), "head_dim 256");
  CHECK(!supports_prefill(DeviceKind::kCpu, DType::kBFloat16, 264), "head_dim 264");
  CHECK(supports_hybrid(DeviceKind::kCpu, {KvFormat::kFp16, KvFormat::kInt8}, 80), "head_dim 80");
  CHECK(!supports_hybrid(DeviceKind::kCpu, {KvFormat::kInt8, KvFormat::kFp16}, 80), "no pair");
  const bool has_gpu = supports_decode(DeviceKind::kCuda, {KvFormat::kFp16, KvFormat::kFp16}, 128, 1);
  CHECK(supports_hybrid(DeviceKind::kCuda, {KvFormat::kFp16, KvFormat::kFp16}, 128) == has_gpu, "CUDA decodes and prefills");
  CHECK(supports_prefill(DeviceKind::kCuda, DType::kFloat16, 128) == has_gpu, "CUDA prefills in float16");
}

void a_plan_must_be_made() {
  PrefillProblem prefill({});
  CHECK_THROWS(prefill_attention(prefill.params, {}, {}, nullptr), InvalidArgument,
               "plan must come from plan_prefill_attention");
  CHECK_THROWS(prefill_attention(prefill.params, {}, plan_prefill_attention(prefill.params, {}), nullptr), InvalidArgument,
               "scratch must hold");
  HybridProblem hybrid({});
  CHECK_THROWS(hybrid_attention(hybrid.params, {}, {}, {}), InvalidArgument, "plan must come from plan_hybrid_attention");
  Problem problem({});
  CHECK_THROWS(decode_attention(problem.params, {}, {}, {}), InvalidArgument, "plan must come from plan_decode_attention");
}

void what_is_built_can_be_listed() {
  CHECK(!cpu_variants().empty(), "no CPU variant runs here");
  CHECK(!built_backends().empty() && built_backends()[0].name == "cpu", "the CPU backend is always built");
  CHECK(version() == QATTN_VERSION, version());
  CHECK(parse_kv_pair("fp16/int8") == (KvPair{KvFormat::kFp16, KvFormat::kInt8}), "fp16/int8");
  CHECK(!parse_kv_pair("int8/fp16") && !parse_kv_pair("") && !parse_kv_pair("int8/int8"), "names that are none");
}

}  // namespace

int main() {
  arguments_of_decode();
  arguments_of_prefill();
  arguments_of_hybrid();
  empty_calls();
  caches();
  arguments_of_codecs();
  missing_kernels();
  missing_kernels_of_ragged_batches();
  a_plan_must_be_made();
  what_is_built_can_be_listed();
  return finish("errors_test");
}
