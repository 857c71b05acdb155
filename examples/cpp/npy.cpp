#include "npy.h"

#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <vector>

// The format: 6 magic bytes, the version in 2, the length of the header in 2 (version 1) or 4, and the header:
// a Python dictionary such as {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }.
// https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr std::size_t kLengthAt = 8;

const std::map<std::string, at::ScalarType> kTypes = {
    {"<f4", at::kFloat}, {"<f2", at::kHalf}, {"|i1", at::kChar}, {"|u1", at::kByte}, {"<i8", at::kLong}};

struct Header {
  at::ScalarType type;
  std::vector<int64_t> shape;
  std::size_t data_at;
};

// The bytes of a file, as long as anyone holds it.
struct Mapping {
  explicit Mapping(const std::string& path) {
    int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status {};
    if (file >= 0 && fstat(file, &status) == 0 && status.st_size > 0) {
      size = static_cast<std::size_t>(status.st_size);
      data = mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0);
    }
    if (file >= 0) close(file);
    if (data == MAP_FAILED) throw std::runtime_error(path + ": cannot be read");
  }
  ~Mapping() {
    if (data != MAP_FAILED) munmap(data, size);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::string_view bytes() const { return {static_cast<const char*>(data), size}; }

  void* data = MAP_FAILED;
  std::size_t size = 0;
};

std::string found(const std::string& header, const char* pattern) {
  std::smatch match;
  return std::regex_search(header, match, std::regex(pattern)) ? match[1].str() : "";
}

std::vector<int64_t> shape_of(const std::string& numbers) {
  std::vector<int64_t> shape;
  std::istringstream stream(numbers);
  for (std::string number; std::getline(stream, number, ',');) {
    if (number.find_first_of("0123456789") != std::string::npos) shape.push_back(std::stoll(number));
  }
  return shape;
}

Header read_header(std::string_view bytes, const std::string& path) {
  if (bytes.size() < kLengthAt + 4 || bytes.substr(0, kMagic.size()) != kMagic) {
    throw std::runtime_error(path + ": not a .npy file");
  }
  std::size_t width = bytes[kMagic.size()] == 1 ? 2 : 4;
  std::uint32_t length = 0;
  std::memcpy(&length, bytes.data() + kLengthAt, width);
  std::string header(bytes.substr(kLengthAt + width, length));
  auto type = kTypes.find(found(header, "'descr': *'([^']*)'"));
  if (type == kTypes.end() || found(header, "'fortran_order': *(\\w+)") != "False") {
    throw std::runtime_error(path + ": not numbers that artifacts use, in C order: " + header);
  }
  return {type->second, shape_of(found(header, "'shape': *\\(([^)]*)\\)")), kLengthAt + width + length};
}

}  // namespace

at::Tensor map_npy(const std::string& path) {
  auto mapping = std::make_shared<Mapping>(path);
  Header header = read_header(mapping->bytes(), path);
  std::size_t size = c10::elementSize(header.type);
  for (int64_t length : header.shape) size *= static_cast<std::size_t>(length);
  if (header.data_at + size != mapping->size) throw std::runtime_error(path + ": cut off, or too long");
  return at::from_blob(
      static_cast<char*>(mapping->data) + header.data_at, header.shape,
      [mapping](void*) mutable { mapping.reset(); }, at::TensorOptions(header.type));
}

void write_npy(const std::string& path, const at::Tensor& vector) {
  std::string header =
      "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(vector.numel()) + ",), }";
  header.resize((kLengthAt + 2 + header.size()) / 64 * 64 + 64 - kLengthAt - 2 - 1, ' ');  // data at n * 64
  header += '\n';
  auto length = static_cast<std::uint16_t>(header.size());
  std::ofstream file(path, std::ios::binary);
  file << kMagic << '\x01' << '\0';
  file.write(reinterpret_cast<const char*>(&length), sizeof length);
  file << header;
  file.write(static_cast<const char*>(vector.data_ptr()), static_cast<std::streamsize>(vector.nbytes()));
  if (!file.flush()) throw std::runtime_error(path + ": cannot be written");
}
