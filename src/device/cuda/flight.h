// One extent on its way between host memory and the paged cache.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "device/cuda/move.h"
#include "device/device.h"

namespace tokendepot::cuda {

struct Flight {
  ScatterWork* scatter = nullptr;  // one of the two
  GatherWork* gather = nullptr;
  std::span<std::byte> payload;
  std::vector<std::span<std::byte>> pieces;  // of the payload, where the device reaches it; else empty
  std::byte* region = nullptr;               // of the slab's address map
  std::byte* device = nullptr;               // the same in the slab
  std::byte* note = nullptr;                 // block ids and digests, in memory that both sides see
  cudaStream_t stream = nullptr;
  cudaEvent_t done = nullptr;
  Move move{};
  bool aligned = false;
};

}  // namespace tokendepot::cuda
