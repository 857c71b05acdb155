// Scores rows by the compiled network of an artifact, without Python:
//
//   score ARTIFACT IDS.npy PROBABILITIES.npy
//
// IDS holds int64 [rows, S], as `Scorer.ids` makes them of raw rows and `numpy.save` writes them;
// PROBABILITIES becomes float32 [rows]. Exits with 2 and one line of what is wrong.

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <exception>
#include <iostream>
#include <stdexcept>

#include "artifact.h"
#include "npy.h"

namespace {

constexpr std::int64_t kRowsAtOnce = 4096;  // bounds the memory of a call

at::Tensor score(const Artifact& artifact, const at::Tensor& ids) {
  torch::inductor::AOTIModelPackageLoader network(artifact.network);
  at::Tensor probabilities = at::empty({ids.size(0)}, at::kFloat);
  for (std::int64_t start = 0; start < ids.size(0); start += kRowsAtOnce) {
    const std::int64_t rows = std::min(kRowsAtOnce, ids.size(0) - start);
    std::vector<at::Tensor> arguments{ids.narrow(0, start, rows)};
    arguments.insert(arguments.end(), artifact.tables.begin(), artifact.tables.end());
    probabilities.narrow(0, start, rows).copy_(network.run(arguments).at(0));
  }
  return probabilities;
}

void run(const std::string& root, const std::string& ids_path, const std::string& output) {
  const c10::InferenceMode guard;
  const Artifact artifact = open_artifact(root);
  const at::Tensor ids = map_npy(ids_path);
  if (ids.scalar_type() != at::kLong || ids.dim() != 2 || ids.size(1) != artifact.num_slots) {
    throw std::runtime_error(ids_path + ": not int64 [rows, " + std::to_string(artifact.num_slots) + "]");
  }
  write_npy(output, score(artifact, ids));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: score ARTIFACT IDS.npy PROBABILITIES.npy\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
  }
  return 0;
}
