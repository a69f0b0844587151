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

/// Zero between an extent and the next: the kernels leave it as they found it.
struct Counters {
  uint32_t asked;             // thread blocks of scatter that know the outcome
  uint32_t bad;               // 1 when a shard differs
  uint32_t pages_done[4094];  // [shards]
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
  uint32_t* outcome;        // mapped host memory: scatter leaves 0 = written or 1 = bad here
  uint64_t few_digests[kFewDigests];
};

/// Loads the code onto the device now: later it might have to wait for all that the engine has queued. Fails
/// where this build has no code for the GPU.
cudaError_t load_kernels();
/// Blocks of threads in each launch for `move`: bounded, and no more than there are pages for their warps.
uint32_t thread_blocks(const Move& move);
/// Gather and digest in one kernel.
cudaError_t launch_gather(const Move& move, const Secret& secret, bool aligned, cudaStream_t stream);
/// Notes in the counters whether every shard of the run is right. Does not touch the paged cache.
cudaError_t launch_verify(const Move& move, const Secret& secret, cudaStream_t stream);
/// Behind launch_verify() of the same `move` on the same stream: tells the outcome, and writes unless it is
/// bad.
cudaError_t launch_scatter(const Move& move, bool aligned, cudaStream_t stream);

}  // namespace tokendepot::cuda
