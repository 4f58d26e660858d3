#pragma once

#include "binding/tensor.h"

namespace quantattn::binding {

enum class Overlap { kNo, kYes, kUnknown };

// Whether two tensors share a byte. Exact where their ranges of addresses are disjoint or where both have the same shape,
// strides and element size (two halves of one buffer); kUnknown otherwise.
Overlap overlap(const Tensor& a, const Tensor& b);

// True unless the strides prove that no two elements share a byte. Only layouts whose strides interleave in a way that no
// sequence of slices, transposes and reshapes makes are refused without need.
bool overlaps_itself(const Tensor& tensor);

// An output: no element twice, no byte shared with an input. `whose` precedes the other's name in the message.
void require_distinct_elements(const Tensor& tensor);
void require_no_overlap(const Tensor& tensor, const Tensor& other, std::string_view whose = "");

}  // namespace quantattn::binding
