// NumPy's `.npy` files as tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

// Maps a file into memory: no byte of it is copied, and pages that nobody reads are never loaded. The tensor
// owns the mapping; writing to it would end the program. Throws std::runtime_error if the file cannot be read,
// or holds anything but numbers in C order and of a type that artifacts use.
at::Tensor map_npy(const std::string& path);

// Writes a float32 vector. Throws std::runtime_error if the file cannot be written.
void write_npy(const std::string& path, const at::Tensor& vector);
