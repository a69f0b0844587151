// What the kernels know of the attached caches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "device/cuda/move.h"
#include "tokendepot/error.h"
#include "tokendepot/layout.h"

namespace tokendepot::cuda {

struct DeviceCache {
  DevicePlane* planes = nullptr;  // device memory
  uint32_t planes_per_layer = 0;
  bool aligned = true;
};

/// Whether every plane lies in memory of this device.
Status check_memory(const PagedCache& cache, int ordinal);

/// For one thread. A cache is known by its address, which must not change while this lives.
class Caches {
 public:
  /// `room`: device memory for what the kernels know. When it is full more is allocated.
  explicit Caches(std::span<std::byte> room) : room_(room) {}
  ~Caches();
  Caches(const Caches&) = delete;
  Caches& operator=(const Caches&) = delete;
  /// Waits for `stream`, on which there should be nothing else.
  cudaError_t find_or_add(const PagedCache& cache, cudaStream_t stream, const DeviceCache** found);

 private:
  cudaError_t allocate(size_t bytes, void** memory);

  std::span<std::byte> room_;  // what is left of it
  std::vector<void*> more_;
  std::map<const PagedCache*, DeviceCache> known_;
};

}  // namespace tokendepot::cuda
