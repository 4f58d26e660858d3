#include "codec_check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "number_types.h"
#include "parallel.h"

namespace sample_runner {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The numbers that round to a code; nothing for codes that an encoder never writes.
struct Cell {
  double least = kInfinity, most = -kInfinity;
};

std::vector<Cell> make_cells(quantattn::KvFormat format) {
  const std::span<const double> values = code_values(format);
  const double largest = max_code(format);
  std::vector<double> sorted;
  for (double value : values)
    if (std::fabs(value) <= largest) sorted.push_back(value);
  std::ranges::sort(sorted);
  std::vector<Cell> cells(values.size());
  for (size_t code = 0; code < values.size(); ++code) {
    if (!(std::fabs(values[code]) <= largest)) continue;
    const auto below = std::ranges::lower_bound(sorted, values[code]), above = std::ranges::upper_bound(sorted, values[code]);
    cells[code] = {below == sorted.begin() ? -kInfinity : (below[-1] + values[code]) / 2,
                   above == sorted.end() ? kInfinity : (above[0] + values[code]) / 2};
  }
  return cells;
}

struct Sums {
  double error = 0, original = 0;
  int64_t num_wrong_codes = 0, num_wrong_scales = 0;
};

// Rounded up to float16, a scale is at most one unit in the last place above the exact one.
bool is_dynamic_scale(double scale, double amax, double largest) {
  const double exact = std::min(amax / largest, 65504.);
  return scale >= exact * (1 - 0x1p-20) && scale <= exact * (1 + 0x1p-10) + 0x1p-24;
}

Sums check_head(const Problem& p, const Cache& cache, Cache::Side side, const std::vector<Cell>& cells, int b, int head) {
  const RowSource& rows = side == Cache::Side::kK ? p.k : p.v;
  const quantattn::KvFormat format = side == Cache::Side::kK ? cache.view().format.k : cache.view().format.v;
  const quantattn::ScaleView& view = side == Cache::Side::kK ? cache.view().k_scale : cache.view().v_scale;
  const bool is_dynamic = view.granularity == quantattn::ScaleGranularity::kTokenHead;
  const std::span<const double> values = code_values(format);
  const double largest = max_code(format);
  const bool has_scale = quantattn::info(format).has_scale;
  std::vector<float> vector(static_cast<size_t>(p.head_dim));
  int64_t token = 0;
  size_t d = 0;
  Sums sums;
  cache.visit(side, b, head, p.seq_lens[static_cast<size_t>(b)], [&](uint16_t code, double scale) {
    if (d == 0) {
      rows.read_vector(b, token++, head, vector.data());
      double amax = 0;
      for (float x : vector) amax = std::max(amax, std::isfinite(x) ? std::fabs(double{x}) : 0.);
      sums.num_wrong_scales += is_dynamic && !is_dynamic_scale(scale, amax, largest);
    }
    const double x = vector[d], slack = std::fabs(x) * 0x1p-20;  // x / scale is rounded to float32 before the code is chosen
    d = (d + 1) % vector.size();
    if (!std::isfinite(x) || (!has_scale && std::fabs(x) > largest)) return;  // no finite code describes it
    const bool is_nearest = scale == 0 ? values[code] == 0 && std::fabs(x) < 0x1p-120
                                       : x >= cells[code].least * scale - slack && x <= cells[code].most * scale + slack;
    sums.num_wrong_codes += !is_nearest;
    const double error = values[code] * scale - x;
    sums.error += error * error;
    sums.original += x * x;
  });
  return sums;
}

}  // namespace

CodecCheck check_codec(const Problem& p, const Cache& cache, Cache::Side side) {
  const std::vector<Cell> cells = make_cells(side == Cache::Side::kK ? cache.view().format.k : cache.view().format.v);
  std::vector<Sums> parts(static_cast<size_t>(int64_t{p.batch_size} * p.num_kv_heads));
  parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t i) {
    parts[static_cast<size_t>(i)] =
        check_head(p, cache, side, cells, static_cast<int>(i / p.num_kv_heads), static_cast<int>(i % p.num_kv_heads));
  });
  Sums total;
  for (const Sums& part : parts) {
    total.error += part.error;
    total.original += part.original;
    total.num_wrong_codes += part.num_wrong_codes;
    total.num_wrong_scales += part.num_wrong_scales;
  }
  return {total.original > 0 ? std::sqrt(total.error / total.original) : 0, total.num_wrong_codes, total.num_wrong_scales};
}

}  // namespace sample_runner
