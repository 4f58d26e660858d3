#pragma once

#include <span>
#include <vector>

#include "device_memory.h"
#include "options.h"
#include "problem.h"
#include "quantattn/kv_cache.h"
#include "scale_values.h"

namespace sample_runner {

// A cache in the memory of a device, filled with the problem's K and V through the library (or with loaded codes).
// Everything that no live token owns holds NaN codes, NaN scales and page ids out of range: a kernel that touches it fails
// the check.
class Cache {
 public:
  Cache(const Problem& problem, quantattn::KvPair format, const Options& options, DeviceMemory& memory);

  const quantattn::KvCacheView& view() const { return view_; }
  // Null for a contiguous cache.
  quantattn::Strided2D<const int32_t> page_table() const;
  int max_pages() const { return max_pages_; }
  // The rows of the page table of some sequences; of a contiguous cache the one that it would have.
  std::vector<int32_t> pages_of(std::span<const int> sequences) const;
  int64_t num_bytes() const;           // codes and scales, unused slots of pages included
  int64_t num_bytes_of_token() const;  // K and V of all heads, with scales that a token owns

  // Copies the stored bytes to the host, for visit().
  void download();
  // Calls body(code bits, scale) for every stored element of K (or V) of one sequence and KV head, in the order [length, D].
  // The scale is 1 where the format has none.
  enum class Side { kK, kV };
  template <class Body>
  void visit(Side side, int b, int head, int64_t length, const Body& body) const {
    const Half& half = side == Side::kK ? k_ : v_;
    const bool is_wide = quantattn::code_bytes(half.format) == 2;
    for (int64_t t = 0; t < length; ++t) {
      const int64_t page = page_of(b, t), token = t % view_.page_size;
      const double scale = scale_of(half, page, token, head);
      const int64_t start = half.array.offset(page, token, head);
      for (int64_t i = start; i < start + view_.head_dim; ++i)
        body(is_wide ? reinterpret_cast<const uint16_t*>(half.host_codes.data())[i]
                     : static_cast<uint16_t>(half.host_codes[static_cast<size_t>(i)]),
             scale);
    }
  }

 private:
  struct Half {  // of the cache: K or V
    quantattn::KvFormat format;
    Buffer codes, scale_data;
    quantattn::VectorArray array;
    quantattn::ScaleView scale;
    std::vector<std::byte> host_codes, host_scales;
  };

  void place_pages(const Problem& problem, const Options& options, DeviceMemory& memory);
  Half make_half(quantattn::KvFormat format, const ScaleValues& scales, DeviceMemory& memory) const;
  void append(const Problem& problem, const Options& options, DeviceMemory& memory);
  void store_codes(Half& half, std::string_view option, const RowSource& rows, const ScaleValues& scales);
  int64_t page_of(int b, int64_t token) const;
  static double scale_of(const Half& half, int64_t page, int64_t token, int head);

  quantattn::KvCacheView view_;
  Half k_, v_;
  bool is_hnd_;
  int max_pages_ = 1;
  std::vector<int32_t> seq_lens_, host_page_table_;  // the table is empty for a contiguous cache
  Buffer page_table_;
};

}  // namespace sample_runner
