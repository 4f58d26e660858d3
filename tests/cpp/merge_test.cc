// merge_states: two halves of a cache joined by their log-sum-exp equal the whole.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "problem.h"

using namespace quantattn;
using namespace quantattn_test;

namespace {

MergeParams rows(std::vector<float>& out_a, std::vector<float>& lse_a, std::vector<float>& out_b, std::vector<float>& lse_b,
                 std::vector<float>& out, std::vector<float>& lse, int head_dim) {
  const auto num_rows = static_cast<int64_t>(lse_a.size());
  MergeParams params;
  for (auto [array, data] : {std::pair{&params.out_a, &out_a}, {&params.out_b, &out_b}, {&params.out, &out}})
    *array = {data->data(), num_rows * head_dim, head_dim, head_dim};
  params.lse_a = lse_a.data();
  params.lse_b = lse_b.data();
  params.lse = lse.data();
  params.batch_size = 1;
  params.num_q_tokens = num_rows;
  params.num_q_heads = 1;
  params.head_dim = head_dim;
  return params;
}

void matches_the_definition(int head_dim) {
  uint32_t state = 3;
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  std::vector<float> lse_a = {1.f, kNothing, 2.f, kNothing, 80.f, -90.f},
                     lse_b = {1.5f, 0.5f, kNothing, kNothing, -80.f, -89.f};
  std::vector<float> out_a(lse_a.size() * static_cast<size_t>(head_dim)), out_b(out_a.size()), out(out_a.size()),
      lse(lse_a.size());
  for (float& x : out_a) x = uniform(state);
  for (float& x : out_b) x = uniform(state);
  merge_states(rows(out_a, lse_a, out_b, lse_b, out, lse, head_dim), {});
  for (size_t r = 0; r < lse.size(); ++r) {
    const double a = lse_a[r], b = lse_b[r], largest = std::max(a, b);
    const bool is_empty = largest == static_cast<double>(kNothing);
    const double expected_lse = is_empty ? largest : largest + std::log(std::exp(a - largest) + std::exp(b - largest));
    CHECK(lse[r] == expected_lse || std::abs(lse[r] - expected_lse) < 1e-5, "row ", r, ": ", lse[r], ", expected ",
          expected_lse);
    for (size_t d = 0; d < static_cast<size_t>(head_dim); ++d) {
      const size_t i = r * static_cast<size_t>(head_dim) + d;
      const double expected = is_empty ? 0 : std::exp(a - expected_lse) * out_a[i] + std::exp(b - expected_lse) * out_b[i];
      CHECK(std::abs(out[i] - expected) < 1e-5, "row ", r, " element ", d, ": ", out[i], ", expected ", expected);
    }
  }
}

void result_may_replace_an_input() {
  std::vector<float> out_a(2 * 64, 1.f), out_b(2 * 64, 3.f), lse_a(2, 0.f), lse_b(2, 0.f);
  merge_states(rows(out_a, lse_a, out_b, lse_b, out_a, lse_a, 64), {});
  CHECK(std::abs(out_a[70] - 2.f) < 1e-6f && std::abs(lse_a[1] - std::log(2.f)) < 1e-6f, out_a[70], " ", lse_a[1]);
}

}  // namespace

int main() {
  for (int head_dim : {1, 40, 64, 256}) matches_the_definition(head_dim);
  result_may_replace_an_input();
  return finish("merge_test");
}
