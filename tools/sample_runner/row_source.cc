#include "row_source.h"

#include "number_types.h"
#include "parallel.h"
#include "random_rows.h"

namespace sample_runner {

RowSource::RowSource(uint64_t seed, int num_heads, int head_dim) : seed_(seed), num_heads_(num_heads), head_dim_(head_dim) {}

RowSource::RowSource(Tensor tensor, std::string path)
    : num_heads_(static_cast<int>(tensor.shape[2])),
      head_dim_(static_cast<int>(tensor.shape[3])),
      tensor_(std::make_shared<const Tensor>(std::move(tensor))),
      path_(std::move(path)) {}

int64_t RowSource::offset(int b, int64_t token) const { return (b * tensor_->shape[1] + token) * num_heads_ * head_dim_; }

void RowSource::read_vector(int b, int64_t token, int head, float* vector) const {
  if (!tensor_) {
    const uint64_t token_seed = mix(mix(seed_, static_cast<uint64_t>(b)), static_cast<uint64_t>(token));
    fill_normal(mix(token_seed, static_cast<uint64_t>(head)), {vector, static_cast<size_t>(head_dim_)});
    return;
  }
  const auto dtype = static_cast<quantattn::DType>(tensor_->type);
  static_assert(static_cast<int>(ElementType::kFloat32) == static_cast<int>(quantattn::DType::kFloat32) &&
                static_cast<int>(ElementType::kFloat16) == static_cast<int>(quantattn::DType::kFloat16) &&
                static_cast<int>(ElementType::kBFloat16) == static_cast<int>(quantattn::DType::kBFloat16));
  const int64_t start = offset(b, token) + int64_t{head} * head_dim_;
  for (int64_t d = 0; d < head_dim_; ++d) vector[d] = static_cast<float>(decode(dtype, tensor_->data.data(), start + d));
}

void RowSource::read(int b, int64_t first, int64_t count, float* rows) const {
  parallel_for(count, [&](int64_t i) {
    for (int head = 0; head < num_heads_; ++head) read_vector(b, first + i, head, rows + (i * num_heads_ + head) * head_dim_);
  });
}

const std::byte* RowSource::codes(int b, int64_t token) const { return tensor_->data.data() + offset(b, token); }

}  // namespace sample_runner
