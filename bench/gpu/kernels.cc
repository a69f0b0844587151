#include "gpu/kernels.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstring>
#include <numeric>

#include "device/cuda/caches.h"
#include "device/cuda/flight.h"
#include "gpu/cuda.h"

namespace tokendepot::bench {
namespace {

/// Device memory, given back with its holder.
CacheMemory device_memory(uint64_t bytes) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, bytes), "device memory");
  must(cudaMemset(memory, 0, bytes), "device memory");
  return {static_cast<std::byte*>(memory), [](std::byte* at) { cudaFree(at); }};
}

/// One extent, and as many blocks of a paged cache as it fills, in an order that is not that of the memory.
class Extent {
 public:
  explicit Extent(double mib)
      : cells_(device_cache(shape_of_mib(mib).payload_bytes())),
        payload_(device_memory(shape_of_mib(mib).payload_bytes())),
        digests_(device_memory(cuda::digest_bytes(shape_of_mib(mib).payload_bytes()))),
        counters_(device_memory(sizeof(cuda::Counters))) {
    void* note = nullptr;
    must(cudaHostAlloc(&note, cuda::kNoteBytes, cudaHostAllocDefault), "pinned notes");
    note_ = {static_cast<std::byte*>(note), [](std::byte* at) { cudaFreeHost(at); }};
    cache_.shape = shape_of_mib(mib);
    cache_.block_count = static_cast<uint32_t>(cache_.shape.blocks());
    const uint64_t plane =
        uint64_t{cache_.shape.block_tokens} * cache_.shape.part.heads() * cache_.shape.row_bytes;
    const auto row = static_cast<int64_t>(cache_.shape.row_bytes);
    const int64_t token = row * static_cast<int64_t>(cache_.shape.part.heads());
    for (uint32_t layer = 0; layer < cache_.shape.part.layers(); ++layer) {
      std::byte* const base = cells_.get() + layer * 2 * plane * cache_.block_count;
      cache_.layers.push_back({{base, static_cast<int64_t>(2 * plane), row, token, 0},
                               {base + plane, static_cast<int64_t>(2 * plane), row, token, 0}});
    }
    must(caches_.find_or_add(cache_, stream_, &known_), "the paged cache");
    blocks_.resize(cache_.block_count);
    std::iota(blocks_.rbegin(), blocks_.rend(), 0);
    std::memcpy(secret_.words, XXH3_kSecret, sizeof secret_.words);
    flight_.counters = reinterpret_cast<cuda::Counters*>(counters_.get());
    flight_.note = note_.get();
    store_.cache = &cache_;
    describe_store();
    queue_store();  // so that what loads verify is right
    must(cudaStreamSynchronize(stream_), "gather");
    header_.set_shape(cache_.shape);
    header_.shard_digests.assign(flight_.note_digests, flight_.note_digests + cache_.shape.shards());
  }

  void describe_store() { describe(&store_, nullptr); }
  void describe_load() {
    load_.cache = &cache_;
    load_.header = &header_;
    load_.shards = cache_.shape.shards();
    describe(nullptr, &load_);
  }
  void queue_store() { must(cuda::launch_gather(flight_.move, secret_, flight_.aligned, stream_), "gather"); }
  void queue_load() {
    must(cuda::launch_verify(flight_.move, secret_, stream_), "verify");
    must(cuda::launch_scatter(flight_.move, flight_.aligned, stream_), "scatter");
  }
  void check_load() const {
    if (*flight_.note_outcome != 0) stop("an extent that was just gathered is not right");
  }
  uint64_t bytes() const { return cache_.shape.payload_bytes(); }
  uint32_t thread_blocks() const { return cuda::thread_blocks(flight_.move); }
  cudaStream_t stream() const { return stream_; }

 private:
  void describe(GatherWork* store, ScatterWork* load) {
    flight_.gather = store;
    flight_.scatter = load;
    const std::span<std::byte> payload(payload_.get(), bytes());
    const cuda::Job job{&cache_, cache_.shape, 0, cache_.shape.shards(), blocks_, payload, true};
    cuda::describe(job, *known_, payload.data(), digests_.get(), flight_);
  }

  CacheMemory cells_, payload_, digests_, counters_, note_;
  PagedCache cache_;
  Stream stream_;
  cuda::Caches caches_{{}};
  const cuda::DeviceCache* known_ = nullptr;
  std::vector<int32_t> blocks_;
  cuda::Secret secret_{};
  cuda::Flight flight_;
  GatherWork store_;
  ScatterWork load_;
  ExtentHeader header_;
};

}  // namespace

KernelRate measure_kernels(double mib, bool store, double seconds) {
  Extent extent(mib);
  if (!store) extent.describe_load();
  const Event begin(cudaEventDefault), end(cudaEventDefault);
  KernelRate rate{.gb_per_s = 0, .blocks = extent.thread_blocks()};
  constexpr int kAtOnce = 100;
  double spent_ms = 0, extents = 0;
  for (bool warm = false; spent_ms < seconds * 1e3; warm = true) {
    must(cudaEventRecord(begin, extent.stream()), "an event");
    for (int i = 0; i < kAtOnce; ++i) store ? extent.queue_store() : extent.queue_load();
    must(cudaEventRecord(end, extent.stream()), "an event");
    must(cudaEventSynchronize(end), store ? "gather" : "verify and scatter");
    float took_ms = 0;
    must(cudaEventElapsedTime(&took_ms, begin, end), "an event");
    if (!warm) continue;
    spent_ms += took_ms;
    extents += kAtOnce;
  }
  if (!store) extent.check_load();
  rate.gb_per_s = extents * static_cast<double>(extent.bytes()) / spent_ms / 1e6;
  return rate;
}

}  // namespace tokendepot::bench
