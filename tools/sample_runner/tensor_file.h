#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sample_runner {

enum class ElementType : uint8_t { kFloat32, kFloat16, kBFloat16, kInt8, kUint8 };
inline constexpr std::string_view kElementTypeNames[] = {"float32", "float16", "bfloat16", "int8", "uint8"};
constexpr std::string_view name(ElementType type) { return kElementTypeNames[static_cast<size_t>(type)]; }
constexpr int64_t bytes_of(ElementType type) {
  return type == ElementType::kFloat32 ? 4 : type == ElementType::kFloat16 || type == ElementType::kBFloat16 ? 2 : 1;
}

// A tensor read from a file, row-major.
struct Tensor {
  ElementType type = ElementType::kFloat32;
  std::vector<int64_t> shape;
  std::vector<std::byte> data;
};

// Reads a .npy file (versions 1 and 2), or anything else as raw little-endian numbers of `type`, with the shape [number of
// elements]. A .npy file says its own type, except that NumPy has no bfloat16: uint16 is read as bfloat16 where `type` is.
// Throws UsageError, naming the file, for a file that is truncated, in Fortran order or of another type.
Tensor read_tensor(const std::string& path, std::optional<ElementType> type);

}  // namespace sample_runner
