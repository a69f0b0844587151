// Launch parameters of the CUDA kernels: plain structs, so that nvcc (C++20) and the engine (C++23) share
// them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/cuda/locate.h"

namespace tokendepot::cuda {

/// XXH3's default secret (192 bytes) as 64-bit words; uploaded from the xxhash library, so that both always
/// agree.
struct Secret {
  uint64_t words[24];
};

constexpr uint32_t kFewDigests = 64;

/// Zero between launches: a kernel leaves it as it found it.
struct Counters {
  uint32_t arrived;           // thread blocks of verify + scatter that have verified
  uint32_t left;              // of them, those that know the outcome
  uint32_t bad;               // 1 when a shard differs
  uint32_t pages_done[4093];  // [shards]
};
constexpr uint32_t kMostShards = sizeof Counters::pages_done / sizeof(uint32_t);

/// One extent between its payload and the paged cache. All pointers are device memory unless said otherwise.
struct Move {
  Fit fit;
  uint32_t shards;  // the run that lies in `payload`
  uint64_t shard_bytes, shard_stride;
  uint8_t* payload;
  // Digests.
  uint64_t* page_digests;   // one a page of the run
  uint64_t* shard_digests;  // [shards], mapped host memory: gather writes; verify reads what is expected, or
                            // null = few_digests
  Counters* counters;       // of this launch alone
  uint32_t* outcome;        // mapped host memory: verify + scatter leaves 0 = written or 1 = bad here
  uint64_t few_digests[kFewDigests];
};

/// Loads the code onto the device now: later it might have to wait for all that the engine has queued. Fails
/// where this build has no code for the GPU.
cudaError_t load_kernels();
/// Gather and digest in one kernel. `blocks` thread blocks of 512.
cudaError_t launch_gather(const Move& move, const Secret& secret, uint32_t blocks, bool aligned,
                          cudaStream_t stream);
/// Verify and scatter in one cooperative kernel: nothing is written unless every shard of the run is right.
cudaError_t launch_scatter(const Move& move, const Secret& secret, uint32_t blocks, bool aligned,
                           cudaStream_t stream);

}  // namespace tokendepot::cuda
