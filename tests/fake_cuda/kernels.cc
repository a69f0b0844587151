// The kernels' twins, over the same description of a move.
#include <cstring>
#include <vector>

#include "device/cuda/move.h"
#include "fake_cuda/faults.h"
#include "fake_cuda/stream.h"
#include "format/digest.h"

namespace tokendepot::cuda {
namespace {

namespace fake = testing::fake_cuda;

std::span<const std::byte> shard_of(const Move& move, uint32_t shard) {
  return {reinterpret_cast<const std::byte*>(move.payload) + shard * move.shard_stride, move.shard_stride};
}

/// Calls `copy(of the payload, in the cache, bytes)` for what lies in one piece on both sides.
template <typename Copy>
void each_piece(const Move& move, const Copy& copy) {
  for (uint32_t shard = 0; shard < move.shards; ++shard) {
    for (uint64_t at = 0; at < move.shard_bytes;) {
      const Target there = locate(move.fit, shard, static_cast<uint32_t>(at));
      const uint64_t run = std::min<uint64_t>(there.run, move.shard_bytes - at);
      if (there.at != nullptr) copy(move.payload + shard * move.shard_stride + at, there.at, run);
      at += run;
    }
  }
}

void gather(const Move& move) {
  std::memset(move.payload, 0, move.shards * move.shard_stride);
  each_piece(move,
             [](uint8_t* payload, const uint8_t* cache, uint64_t run) { std::memcpy(payload, cache, run); });
  for (uint32_t shard = 0; shard < move.shards; ++shard)
    move.shard_digests[shard] = shard_digest(shard_of(move, shard));
}

void verify(const Move& move) {
  for (uint32_t shard = 0; shard < move.shards; ++shard) {
    const uint64_t expected =
        move.shard_digests != nullptr ? move.shard_digests[shard] : move.few_digests[shard];
    if (shard_digest(shard_of(move, shard)) != expected) move.counters->bad = 1;
  }
}

void scatter(const Move& move) {
  const uint32_t bad = move.counters->bad;
  move.counters->bad = 0;
  if (bad == 0)
    each_piece(
        move, [](const uint8_t* payload, uint8_t* cache, uint64_t run) { std::memcpy(cache, payload, run); });
  *move.outcome = bad;
}

}  // namespace

cudaError_t load_kernels() {
  return fake::called("load_kernels");
}

uint32_t thread_blocks(const Move&) {
  return 1;
}

cudaError_t launch_gather(const Move& move, const Secret&, bool, cudaStream_t stream) {
  if (const cudaError_t failed = fake::called("launch_gather"); failed != cudaSuccess) return failed;
  stream->queue([move] { gather(move); });
  return cudaSuccess;
}

cudaError_t launch_verify(const Move& move, const Secret&, cudaStream_t stream) {
  if (const cudaError_t failed = fake::called("launch_verify"); failed != cudaSuccess) return failed;
  stream->queue([move] { verify(move); });
  return cudaSuccess;
}

cudaError_t launch_scatter(const Move& move, bool, cudaStream_t stream) {
  if (const cudaError_t failed = fake::called("launch_scatter"); failed != cudaSuccess) return failed;
  stream->queue([move] { scatter(move); });
  return cudaSuccess;
}

}  // namespace tokendepot::cuda
