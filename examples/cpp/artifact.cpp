#include "artifact.h"

#include <ATen/ops/tensor.h>
#include <sys/utsname.h>
#include <torch/version.h>

#include <fstream>
#include <iterator>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>

#include "json.h"
#include "npy.h"

namespace {

constexpr std::int64_t kFormat = 1;

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read; name a directory that `hetegen export` wrote");
  return {std::istreambuf_iterator<char>(file), {}};
}

// The instruction sets of this processor, by the names that Linux gives them.
std::set<std::string> instruction_sets() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("flags") || line.starts_with("Features")) {
      std::istringstream flags(line.substr(line.find(':') + 1));
      return {std::istream_iterator<std::string>(flags), {}};
    }
  }
  return {};
}

void require_processor(const Json& hardware) {
  utsname machine{};
  uname(&machine);
  if (hardware["machine"].text() != machine.machine) {
    throw std::runtime_error("the network was compiled for " + hardware["machine"].text());
  }
  std::set<std::string> here = instruction_sets();
  for (const Json& name : hardware["extensions"].items()) {
    if (!here.contains(name.text())) {
      throw std::runtime_error("the network was compiled for a processor with " + name.text() +
                               "; export it on one like this");
    }
  }
}

// Compiled code fits the libtorch that it was compiled with, whatever stands behind the plus of its version.
void require_libtorch(const std::string& version) {
  const std::string here = TORCH_VERSION;
  if (version.substr(0, version.find('+')) != here.substr(0, here.find('+'))) {
    throw std::runtime_error("the network was compiled with torch " + version + ", but this is " + here);
  }
}

// [S]: the table that each id of a row points into. Fields stand in the order of the schema; a list has as many
// slots as it keeps values.
std::vector<std::string> tables_of_slots(const Json& fields) {
  std::vector<std::string> tables;
  for (const Json& field : fields.items()) {
    std::int64_t slots = field["max_length"].is_null() ? 1 : field["max_length"].integer();
    const Json& shared = field["table"];
    tables.insert(tables.end(), slots, shared.is_null() ? field["name"].text() : shared.text());
  }
  return tables;
}

std::optional<std::int64_t> first_row(const Json& group, const std::string& table) {
  for (const auto& [name, row] : group["first_rows"].members()) {
    if (name == table) return row.integer();
  }
  return std::nullopt;
}

// The parts that stored rows have, in the order in which the network takes them.
std::vector<std::string> parts_of(const std::string& precision) {
  if (precision == "int8" || precision == "int4") return {"values", "scale"};
  return {"values"};
}

}  // namespace

Artifact open_artifact(const std::string& root) {
  const Json manifest = Json::parse(read(root + "/manifest.json"));
  if (manifest["format_version"].integer() != kFormat) {
    throw std::runtime_error(root + ": an artifact of another format than " + std::to_string(kFormat));
  }
  const Json& network = manifest["backends"]["aoti"];
  require_libtorch(network["libraries"]["torch"].text());
  require_processor(network["hardware"]);

  const auto slots = tables_of_slots(manifest["features"]["fields"]);
  Artifact artifact{root + "/" + network["file"].text(), static_cast<std::int64_t>(slots.size()), {}};
  // By group: where the table of each of its slots begins, and then the rows of all its tables.
  for (const Json& group : manifest["tables"].items()) {
    std::vector<std::int64_t> first_rows;
    for (const std::string& table : slots) {
      if (auto row = first_row(group, table)) first_rows.push_back(*row);
    }
    artifact.tables.push_back(at::tensor(first_rows, at::kLong));
    for (const std::string& part : parts_of(manifest["precision"].text())) {
      artifact.tables.push_back(map_npy(root + "/" + group["files"][part].text()));
    }
  }
  return artifact;
}
