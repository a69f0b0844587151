// Memory of the paged cache that a workload stores from and loads into, on the host or on a GPU.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "tokendepot/error.h"
#include "workload/payload.h"

namespace tokendepot {

/// Not thread-safe. Offsets and sizes within size().
class CacheMemory {
 public:
  virtual ~CacheMemory() = default;
  /// On the device.
  virtual std::byte* data() = 0;
  virtual Status write(uint64_t at, std::span<const std::byte> bytes) = 0;
  virtual Status read(uint64_t at, std::span<std::byte> out) = 0;
  /// stamp_payload() of [at, at + bytes); on a GPU in order of stream().
  virtual Status stamp(uint64_t at, uint64_t bytes, const PayloadId& id) = 0;
  /// The stream that stamp() works on, for Depot::mark_stream(); null on the host.
  virtual void* stream() = 0;
};

/// `no_space` when the system refuses so much. The memory is present and in huge pages where there are any.
Result<std::unique_ptr<CacheMemory>> make_host_memory(uint64_t bytes);
/// `unsupported` in a build without CUDA; `no_space`; `io` with the driver's words.
Result<std::unique_ptr<CacheMemory>> make_cuda_memory(uint32_t ordinal, uint64_t bytes);

}  // namespace tokendepot
