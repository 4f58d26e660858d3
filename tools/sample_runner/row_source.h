#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "tensor_file.h"

namespace sample_runner {

// K or V before quantisation: loaded, or generated vector by vector, so that a long batch needs no float copy of itself.
class RowSource {
 public:
  RowSource() = default;
  RowSource(uint64_t seed, int num_heads, int head_dim);
  // `tensor` has the shape [B, L, H, D].
  RowSource(Tensor tensor, std::string path);

  bool holds_codes() const { return tensor_ && bytes_of(tensor_->type) == 1; }
  ElementType type() const { return tensor_ ? tensor_->type : ElementType::kFloat32; }
  const std::string& path() const { return path_; }

  // The D elements of one token and head. Not for codes.
  void read_vector(int b, int64_t token, int head, float* vector) const;
  // Tokens [first, first + count) of sequence b as [count, H, D].
  void read(int b, int64_t first, int64_t count, float* rows) const;
  // The H * D codes of one token.
  const std::byte* codes(int b, int64_t token) const;

 private:
  int64_t offset(int b, int64_t token) const;

  uint64_t seed_ = 0;
  int num_heads_ = 0, head_dim_ = 0;
  std::shared_ptr<const Tensor> tensor_;
  std::string path_ = "generated data";
};

}  // namespace sample_runner
