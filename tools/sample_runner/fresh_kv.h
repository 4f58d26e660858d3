#pragma once

#include <cstddef>
#include <vector>

#include "device_memory.h"
#include "problem.h"

namespace sample_runner {

// K and V that no cache holds yet: the sequences' tokens one after another, in q's type, on a device.
class FreshKv {
 public:
  FreshKv(const Problem& problem, DeviceMemory& memory);

  enum class Side { kK, kV };
  quantattn::VectorArray array(Side side) const;  // [1, S, H, D]
  int64_t num_tokens() const { return first_keys_.back(); }
  quantattn::Strided1D<const int32_t> cu_seqlens_k() const { return {cu_seqlens_k_.as<const int32_t>(), 1}; }
  int64_t num_bytes_of_token() const;  // K and V of all heads

  // The [length, D] rows of one sequence and KV head, as the device has them.
  void read(Side side, int b, int head, int64_t length, std::vector<double>& rows) const;

 private:
  struct Half {  // K or V
    std::vector<std::byte> host;
    Buffer device;
  };
  const Half& half(Side side) const { return side == Side::kK ? k_ : v_; }
  Half make_half(const Problem& problem, const RowSource& rows, DeviceMemory& memory) const;

  quantattn::DType dtype_;
  int num_heads_, head_dim_;
  std::vector<int32_t> first_keys_;  // [B + 1], then S
  Half k_, v_;
  Buffer cu_seqlens_k_;
};

}  // namespace sample_runner
