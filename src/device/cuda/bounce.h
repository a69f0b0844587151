// Copies between the device and host memory that it does not reach: piece by piece through pinned memory.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "tokendepot/error.h"

namespace tokendepot::cuda {

/// For one thread. Two pieces, so that the CPU's copy of one overlaps the transfer of the other.
class Bounce {
 public:
  static constexpr uint64_t kPieceBytes = 4ull << 20;
  static constexpr uint64_t kPinnedBytes = 2 * kPieceBytes;
  enum class Copied : uint8_t { ok, gone /* the mapping failed */, failed };

  Bounce() = default;
  ~Bounce();
  Bounce(const Bounce&) = delete;
  Bounce& operator=(const Bounce&) = delete;
  Status start();

  /// One piece or less. Returns when it is on its way: `then` runs on behind it.
  Copied to_device(std::byte* device, std::span<const std::byte> from, bool guarded, cudaStream_t then);
  /// Returns when all of it is there.
  Copied to_host(std::span<std::byte> to, const std::byte* device, bool guarded);

 private:
  Copied stop(Copied why);

  cudaStream_t stream_ = nullptr;
  std::byte* memory_ = nullptr;
  size_t piece_ = 0;  // the one that goes to the device next
  std::array<cudaEvent_t, 2> moved_{};
};

}  // namespace tokendepot::cuda
