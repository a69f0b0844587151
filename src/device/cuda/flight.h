// One extent on its way between host memory and the paged cache.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "device/cuda/caches.h"
#include "device/cuda/move.h"
#include "device/device.h"
#include "tokendepot/layout.h"

namespace tokendepot::cuda {

constexpr uint64_t kNoteBytes = 256 << 10;  // block ids and digests of one work in mapped host memory

/// What one work needs besides its payload.
struct Needs {
  uint64_t region_bytes;
  uint64_t note_bytes;
};

/// Device memory for the digests of a payload's pages.
inline uint64_t digest_bytes(uint64_t payload_bytes) {
  return align_up(payload_bytes / kPageBytes * 8, 256);
}

/// `on_device`: the payload has a place of its own in the device's memory.
inline Needs needs_of(uint64_t payload_bytes, uint32_t shards, uint64_t blocks, bool on_device = false) {
  return {(on_device ? 0 : payload_bytes) + digest_bytes(payload_bytes),
          align_up(blocks * 4, 8) + uint64_t{shards} * 8 + 8};
}

/// The kernels count the bytes of a shard in 31 bits.
inline bool fits_kernels(const GroupShape& shape) {
  return shape.shard_stride() <= INT32_MAX && shape.shards() <= kMostShards;
}

constexpr uint32_t kNoOutcome = 2;  // what a note says until the kernel has ended

struct Flight {
  ScatterWork* scatter = nullptr;  // one of the two
  GatherWork* gather = nullptr;
  std::span<std::byte> payload;
  const DeviceCache* cache = nullptr;
  std::vector<std::span<std::byte>>
      pieces;                    // what is copied, in host memory that the device reaches; else empty
  bool reached = false;          // the device needs no copier to reach the payload
  std::byte* region = nullptr;   // of the slab, given back with this flight; its neighbours use it, too
  std::byte* device = nullptr;   // where the kernel finds the payload
  Flight* lands_with = nullptr;  // the last of those that share a copy, maybe this one: its `done` tells
  std::byte* note = nullptr;     // block ids and digests, in memory that both sides see
  uint64_t* note_digests = nullptr;
  uint32_t* note_outcome = nullptr;
  Counters* counters = nullptr;  // in device memory
  bool stale = false;            // the counters could not be cleared: not before they are
  cudaStream_t stream = nullptr;
  uint32_t lane = 0;             // the number of the stream
  cudaEvent_t copied = nullptr;  // behind the copy that this one shares as the last
  cudaEvent_t done = nullptr;
  Move move{};
  bool aligned = false;
};

/// What the work of a flight asks for, load or store.
struct Job {
  const PagedCache* cache;
  GroupShape shape;  // of the extent
  uint32_t first_shard, shards;
  std::span<const int32_t> blocks;
  std::span<std::byte> payload;  // of a load: only read from
  bool on_device;
};
Job job_of(const Flight& flight);

/// Writes down what the kernel does: in `move`, and in the note what does not fit there. `payload` and
/// `digests` are device memory, kept until the kernel has ended.
void describe(const Job& job, const DeviceCache& known, std::byte* payload, std::byte* digests,
              Flight& flight);

}  // namespace tokendepot::cuda
