// An artifact of `hetegen export` as its compiled network takes it.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

struct Artifact {
  std::string network;              // path of the AOTInductor package
  std::int64_t num_slots;           // S: ids of a row
  std::vector<at::Tensor> tables;   // arguments behind the ids, in order
};

// Reads the manifest, maps the tables, and checks that the network was compiled for this processor and this
// libtorch. Checksums are not compared: that takes a reading of every file, and is done where the artifact
// arrives, by `hetegen score` or `Scorer.load`. Throws std::runtime_error if the artifact cannot be used here.
Artifact open_artifact(const std::string& root);
