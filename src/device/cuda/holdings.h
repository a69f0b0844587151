// What a CUDA device takes from the driver when it starts and gives back at its end.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "device/cuda/flight.h"
#include "device/host_slab.h"
#include "tokendepot/error.h"

namespace tokendepot::cuda {

constexpr uint32_t kMostInFlight = 96;
constexpr uint32_t kLoadLanes = 4;
constexpr uint32_t kStoreLanes = 3;

/// Made and destroyed on one thread, the device's own, when nothing of it is in use.
struct Holdings {
  /// From then on the calling thread's new memory comes from the GPU's NUMA node, where the system tells it.
  /// Errors: unsupported (no GPU, no such GPU), no_space (naming what is free), io (the driver's words).
  static Result<std::unique_ptr<Holdings>> make(int ordinal, uint64_t device_slab_bytes, uint64_t slab_bytes);
  ~Holdings();
  Holdings() = default;
  Holdings(const Holdings&) = delete;
  Holdings& operator=(const Holdings&) = delete;
  /// From the GPU's memory to the host's, on any thread of the depot's own, which waits for it.
  cudaError_t copy_to_host(int ordinal, std::byte* to, const std::byte* from, uint64_t bytes) const;

  /// Device memory for what the kernels know of attached caches: had when the depot opens, so that an engine
  /// that fills the GPU afterwards does not take it away.
  std::span<std::byte> descriptions() const;

  void* memory = nullptr;            // device_slab_bytes of the GPU
  std::unique_ptr<HostSlab> pinned;  // slab_bytes of the host
  std::array<Flight, kMostInFlight> flights{};
  cudaStream_t setup_stream = nullptr;  // of what is waited for: nothing of it waits for the engine
  std::array<cudaStream_t, kLoadLanes + kStoreLanes> streams{};  // of loads, then of stores

 private:
  Status take_memory(int ordinal, uint64_t device_slab_bytes);
  Status pin_slab(int ordinal, uint64_t slab_bytes);
  Status make_streams();
  Status make_flights();

  bool slab_is_pinned_ = false;
  void* notes_ = nullptr;     // kNoteBytes a flight, mapped
  void* counters_ = nullptr;  // Counters, one a flight
  void* descriptions_ = nullptr;
};

}  // namespace tokendepot::cuda
