#include "tensor_file.h"

#include <cstring>
#include <filesystem>
#include <fstream>

#include "option_parser.h"

namespace sample_runner {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";

[[noreturn]] void fail_file(const std::string& path, const std::string& message) { throw UsageError(path + ": " + message); }

std::vector<std::byte> read_bytes(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) fail_file(path, "must be a readable file");
  std::vector<std::byte> bytes(std::filesystem::file_size(path));
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size())))
    fail_file(path, "could not be read");
  return bytes;
}

struct NpyHeader {
  std::string_view descr, shape;  // the text between the quotes, between the parentheses
  bool is_fortran_order = false;
  size_t data_offset = 0;
};

// The text that follows `'key':` in the header's Python dictionary, leading blanks removed.
std::string_view value_of(std::string_view dictionary, std::string_view key, const std::string& path) {
  const std::string quoted = std::string("'").append(key).append("':");
  const size_t at = dictionary.find(quoted);
  if (at == std::string_view::npos) fail_file(path, "the .npy header has no " + quoted);
  const std::string_view rest = dictionary.substr(at + quoted.size());
  return rest.substr(std::min(rest.find_first_not_of(' '), rest.size()));
}

std::string_view between(std::string_view text, char open, char close, std::string_view key, const std::string& path) {
  const size_t end = text.find(close, 1);
  if (text.empty() || text[0] != open || end == std::string_view::npos)
    fail_file(path, "the .npy header's '" + std::string(key) + "' must be a plain array type, got " + std::string(text));
  return text.substr(1, end - 1);
}

NpyHeader parse_header(std::string_view file, const std::string& path) {
  if (file.size() < 12) fail_file(path, "truncated: the .npy header is incomplete");
  const int major = static_cast<unsigned char>(file[6]);
  if (major != 1 && major != 2) fail_file(path, ".npy version must be 1 or 2, got " + std::to_string(major));
  const size_t length_bytes = major == 1 ? 2 : 4;
  size_t length = 0;
  for (size_t i = length_bytes; i-- > 0;) length = length << 8 | static_cast<unsigned char>(file[8 + i]);
  const size_t start = 8 + length_bytes;
  if (length > file.size() - start) fail_file(path, "truncated: the .npy header is incomplete");
  const std::string_view dictionary = file.substr(start, length);

  NpyHeader header;
  header.data_offset = start + length;
  header.descr = between(value_of(dictionary, "descr", path), '\'', '\'', "descr", path);
  header.shape = between(value_of(dictionary, "shape", path), '(', ')', "shape", path);
  const std::string_view order = value_of(dictionary, "fortran_order", path);
  header.is_fortran_order = order.starts_with("True");
  if (!header.is_fortran_order && !order.starts_with("False")) fail_file(path, "fortran_order must be True or False");
  return header;
}

std::vector<int64_t> parse_shape(std::string_view text, const std::string& path) {
  constexpr int64_t kMaxElements = int64_t{1} << 48;  // far past any file, far below an overflow of the byte count
  std::vector<int64_t> shape;
  int64_t num_elements = 1;
  for (std::string_view part : split(text, ',')) {
    const size_t first = part.find_first_not_of(' ');
    if (first == std::string_view::npos) continue;  // "(3,)" and "()"
    part = part.substr(first, part.find_last_not_of(' ') + 1 - first);
    shape.push_back(parse_integer(path + ": each size of the shape", part, 0, kMaxElements));
    if (shape.back() > 0 && num_elements > kMaxElements / shape.back()) fail_file(path, "the shape is too large");
    num_elements *= shape.back();
  }
  return shape;
}

ElementType type_of(std::string_view descr, std::optional<ElementType> uint16_type, const std::string& path) {
  std::optional<ElementType> found;
  if (descr == "<f4") found = ElementType::kFloat32;
  if (descr == "<f2") found = ElementType::kFloat16;
  if (descr == "|i1") found = ElementType::kInt8;
  if (descr == "|u1") found = ElementType::kUint8;
  if (descr == "<u2" && uint16_type == ElementType::kBFloat16) found = uint16_type;
  if (!found) fail_file(path, "type must be <f4, <f2, |i1, |u1, or <u2 with --load-type bfloat16, got " + std::string(descr));
  return *found;
}

Tensor parse_npy(std::vector<std::byte> bytes, std::optional<ElementType> uint16_type, const std::string& path) {
  const std::string_view file(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const NpyHeader header = parse_header(file, path);
  if (header.is_fortran_order) fail_file(path, "must be in C order, got Fortran order; save numpy.ascontiguousarray(x)");
  Tensor tensor;
  tensor.type = type_of(header.descr, uint16_type, path);
  tensor.shape = parse_shape(header.shape, path);
  int64_t data_bytes = bytes_of(tensor.type);
  for (int64_t size : tensor.shape) data_bytes *= size;
  const auto present = static_cast<int64_t>(bytes.size() - header.data_offset);
  if (present != data_bytes)
    fail_file(path, std::string(present < data_bytes ? "truncated" : "longer than its shape") + ": the shape needs " +
                        std::to_string(data_bytes) + " bytes of data, got " + std::to_string(present));
  bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(header.data_offset));
  tensor.data = std::move(bytes);
  return tensor;
}

}  // namespace

Tensor read_tensor(const std::string& path, std::optional<ElementType> type) {
  std::vector<std::byte> bytes = read_bytes(path);
  if (bytes.size() >= kMagic.size() && std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) == 0)
    return parse_npy(std::move(bytes), type, path);
  if (path.ends_with(".npy")) fail_file(path, "is not a .npy file: the first bytes are not \\x93NUMPY");
  if (!type) fail_file(path, "is raw, so --load-type must say its type");
  const auto size = static_cast<int64_t>(bytes.size());
  if (size % bytes_of(*type) != 0)
    fail_file(path, "truncated: a raw file of " + std::string(name(*type)) + " must hold whole numbers, got " +
                        std::to_string(size) + " bytes");
  return {*type, {size / bytes_of(*type)}, std::move(bytes)};
}

}  // namespace sample_runner
