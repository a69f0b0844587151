// The CUDA device: extents go between host memory (mapped segments, or the pinned slab) and the paged cache
// in one copy and one kernel each, several in flight, loads on high-priority streams and stores on
// low-priority ones.
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/errors.h"
#include "base/log.h"
#include "device/cuda/cuda_device.h"
#include "device/cuda/move.h"
#include "device/host_slab.h"
#include "io/io_thread.h"
#include "io/mapping.h"

namespace tokendepot {
namespace {

using cuda::Move;

constexpr uint32_t kLoadBlocks =
    16;  // of 512 threads: verify at 440 GB/s, scatter at 160 (design.md section 8)
constexpr uint32_t kStoreBlocks = 16;
constexpr uint32_t kMostInFlight = 16;
constexpr uint64_t kNoteBytes = 1 << 20;  // block ids and digests of one work in mapped host memory

Status check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return {};
  return fail(ErrorKind::io, "CUDA: {}: {}", what, cudaGetErrorString(status));
}

/// What the kernels know of an attached cache.
struct DeviceCache {
  cuda::DevicePlane* planes = nullptr;
  uint32_t planes_per_layer = 0;
  bool aligned = true;
};

/// One work on its way through a stream.
struct Flight {
  ScatterWork* scatter = nullptr;
  GatherWork* gather = nullptr;
  std::byte* region = nullptr;  // of the device slab's address map
  std::byte* bounce = nullptr;  // pinned copy of a payload that is not registered
  uint32_t note = 0;
  cudaEvent_t done = nullptr;
};

class CudaDevice final : public Device {
 public:
  ~CudaDevice() override {
    {
      std::lock_guard lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    if (thread_.joinable()) thread_.join();
    cudaSetDevice(ordinal_);
    for (const auto& [begin, bytes] : registered_) cudaHostUnregister(reinterpret_cast<void*>(begin));
    for (const auto& [cache, known] : caches_) cudaFree(known.planes);
    for (cudaStream_t stream : load_streams_) cudaStreamDestroy(stream);
    for (cudaStream_t stream : store_streams_) cudaStreamDestroy(stream);
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
    if (pinned_) cudaHostUnregister(pinned_->base());
    cudaFreeHost(notes_);
    cudaFree(memory_);
  }

  Status start(uint32_t ordinal, uint64_t device_slab_bytes, uint64_t pinned_bytes) {
    ordinal_ = static_cast<int>(ordinal);
    int count = 0;
    const cudaError_t counted = cudaGetDeviceCount(&count);
    if (counted != cudaSuccess) {
      return fail(ErrorKind::unsupported, "device=cuda:{} is not possible: no GPU can be used here ({})",
                  ordinal, cudaGetErrorString(counted));
    }
    if (ordinal_ >= count) {
      return fail(ErrorKind::unsupported, "device=cuda:{} does not exist: this process sees {} GPUs", ordinal,
                  count);
    }
    if (auto s = check(cudaSetDevice(ordinal_), "cudaSetDevice"); !s) return s;
    size_t free_bytes = 0, total = 0;
    if (auto s = check(cudaMemGetInfo(&free_bytes, &total), "cudaMemGetInfo"); !s) return s;
    if (free_bytes < device_slab_bytes) {
      return fail(ErrorKind::no_space, "device_slab={} is more than the {} bytes that are free on cuda:{}",
                  device_slab_bytes, free_bytes, ordinal);
    }
    if (auto s = check(cudaMalloc(&memory_, device_slab_bytes), "cudaMalloc of the device slab"); !s)
      return s;
    regions_ = std::make_unique<HostSlab>(device_slab_bytes);
    pinned_ = std::make_unique<HostSlab>(pinned_bytes);
    if (auto s = check(cudaHostRegister(pinned_->base(), pinned_->size(), cudaHostRegisterPortable),
                       "pinning the slab");
        !s)
      return s;
    if (auto s = check(cudaHostAlloc(reinterpret_cast<void**>(&notes_), kNoteBytes * kMostInFlight,
                                     cudaHostAllocPortable),
                       "pinned notes");
        !s)
      return s;
    int low = 0, high = 0;
    if (auto s = check(cudaDeviceGetStreamPriorityRange(&low, &high), "stream priorities"); !s) return s;
    for (cudaStream_t& stream : load_streams_) {
      if (auto s = check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, high), "a load stream");
          !s)
        return s;
    }
    for (cudaStream_t& stream : store_streams_) {
      if (auto s = check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, low), "a store stream");
          !s)
        return s;
    }
    events_.resize(kMostInFlight);
    for (uint32_t i = 0; i < kMostInFlight; ++i) {
      if (auto s = check(cudaEventCreateWithFlags(&events_[i], cudaEventDisableTiming), "an event"); !s)
        return s;
      free_notes_.push_back(i);
    }
    std::memcpy(secret_.words, XXH3_kSecret, sizeof secret_.words);
    thread_ = start_io_thread([](void* self) { static_cast<CudaDevice*>(self)->serve(); }, this);
    if (!thread_.joinable()) return fail(ErrorKind::busy, "the system refused the CUDA device's thread");
    return {};
  }

  DeviceStats stats() const override {
    DeviceStats stats;
    stats.name = fmt::format("cuda:{}", ordinal_);
    stats.slab_bytes = regions_->size();
    stats.pinned_bytes = pinned_->size() + kNoteBytes * kMostInFlight;
    stats.threads = 1;
    return stats;
  }
  Slab& slab() override { return *pinned_; }

  void submit(ScatterWork* work) override {
    {
      std::lock_guard lock(mutex_);
      scatters_.push_back(work);
    }
    wake_.notify_one();
  }
  void submit(GatherWork* work) override {
    {
      std::lock_guard lock(mutex_);
      gathers_.push_back(work);
    }
    wake_.notify_one();
  }

  void adopt(std::span<std::byte> mapping, bool writable) override {
    cudaSetDevice(ordinal_);
    const unsigned flags = cudaHostRegisterPortable | (writable ? 0u : unsigned{cudaHostRegisterReadOnly});
    const cudaError_t status = cudaHostRegister(mapping.data(), mapping.size(), flags);
    if (status != cudaSuccess) {
      cudaGetLastError();
      log(LogLevel::warning, "CUDA: {} bytes of a segment are not registered ({}): they go through the slab",
          mapping.size(), cudaGetErrorString(status));
      return;
    }
    std::lock_guard lock(registered_mutex_);
    registered_.emplace(reinterpret_cast<uintptr_t>(mapping.data()), mapping.size());
  }
  void release(std::span<std::byte> mapping) override {
    {
      std::lock_guard lock(registered_mutex_);
      if (registered_.erase(reinterpret_cast<uintptr_t>(mapping.data())) == 0) return;
    }
    cudaSetDevice(ordinal_);
    cudaHostUnregister(mapping.data());
  }

 private:
  bool is_registered(const std::byte* at, uint64_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(at);
    const auto slab = reinterpret_cast<uintptr_t>(pinned_->base());
    if (address >= slab && address + bytes <= slab + pinned_->size()) return true;
    std::lock_guard lock(registered_mutex_);
    auto range = registered_.upper_bound(address);
    if (range == registered_.begin()) return false;
    --range;
    return address + bytes <= range->first + range->second;
  }

  const DeviceCache* cache_of(const PagedCache& cache) {
    const auto found = caches_.find(&cache);
    if (found != caches_.end()) return &found->second;
    DeviceCache known;
    known.planes_per_layer = static_cast<uint32_t>(cache.layers.front().size());
    std::vector<cuda::DevicePlane> planes;
    const auto multiple = [](int64_t value) { return value % 16 == 0; };
    known.aligned = cache.shape.kind == LayoutKind::opaque || multiple(cache.shape.row_bytes);
    for (const auto& layer : cache.layers) {
      uint32_t offset = 0;
      for (const Plane& plane : layer) {
        planes.push_back({reinterpret_cast<uint8_t*>(plane.base), plane.block_stride, plane.head_stride,
                          plane.token_stride, plane.piece_bytes, offset});
        offset += plane.piece_bytes;
        known.aligned = known.aligned && reinterpret_cast<uintptr_t>(plane.base) % 16 == 0 &&
                        multiple(plane.block_stride) && multiple(plane.head_stride) &&
                        multiple(plane.token_stride) && multiple(plane.piece_bytes);
      }
    }
    const size_t bytes = planes.size() * sizeof(cuda::DevicePlane);
    if (cudaMalloc(reinterpret_cast<void**>(&known.planes), bytes) != cudaSuccess ||
        cudaMemcpy(known.planes, planes.data(), bytes, cudaMemcpyHostToDevice) != cudaSuccess) {
      return nullptr;
    }
    return &caches_.emplace(&cache, known).first->second;
  }

  void serve() {
    cudaSetDevice(ordinal_);
    std::unique_lock lock(mutex_);
    while (true) {
      const bool idle = flights_.empty() && scatters_.empty() && gathers_.empty();
      if (idle) {
        if (closing_) return;
        wake_.wait(lock, [this] { return closing_ || !scatters_.empty() || !gathers_.empty(); });
        continue;
      }
      bool progress = false;
      if (!scatters_.empty() && !free_notes_.empty()) {
        ScatterWork* work = scatters_.front();
        scatters_.pop_front();
        lock.unlock();
        const bool started = start_flight(work, nullptr);
        lock.lock();
        if (!started) scatters_.push_front(work);
        progress |= started;
      } else if (!gathers_.empty() && !free_notes_.empty()) {
        GatherWork* work = gathers_.front();
        gathers_.pop_front();
        lock.unlock();
        const bool started = start_flight(nullptr, work);
        lock.lock();
        if (!started) gathers_.push_front(work);
        progress |= started;
      }
      lock.unlock();
      progress |= finish_flights();
      if (!progress) std::this_thread::sleep_for(std::chrono::microseconds(5));
      lock.lock();
    }
  }

  /// False: no room in the device slab, try again when a flight has ended.
  bool start_flight(ScatterWork* scatter, GatherWork* gather) {
    const PagedCache& cache = scatter != nullptr ? *scatter->cache : *gather->cache;
    const GroupShape shape = scatter != nullptr ? scatter->header->shape() : cache.shape;
    const uint32_t shards = scatter != nullptr ? scatter->shards : shape.shards();
    const uint64_t bytes = shards * shape.shard_stride();
    const uint64_t pages = bytes / kPageBytes;
    const std::span<const int32_t> blocks = scatter != nullptr ? scatter->blocks : gather->blocks;
    const uint64_t scratch = align_up(pages * 8 + (shards + 2) * 4, 256);
    const uint64_t note_bytes = align_up(blocks.size() * 4, 8) + shards * 8 + 8;
    const DeviceCache* known = cache_of(cache);
    if (known == nullptr || bytes + scratch > regions_->size() || note_bytes > kNoteBytes) {
      refuse(scatter, gather);
      return true;
    }
    Flight flight;
    flight.scatter = scatter;
    flight.gather = gather;
    flight.region = regions_->allocate(bytes + scratch);
    if (flight.region == nullptr) return false;
    std::byte* host =
        scatter != nullptr ? const_cast<std::byte*>(scatter->payload.data()) : gather->payload.data();
    if (!is_registered(host, bytes)) {
      flight.bounce = pinned_->allocate(bytes);
      if (flight.bounce == nullptr) {
        regions_->release(flight.region);
        return false;
      }
      if (scatter != nullptr) {
        auto copy = [&] { std::memcpy(flight.bounce, host, bytes); };
        if (!scatter->guarded) {
          copy();
        } else if (!guard_mapping(scatter->payload, copy)) {
          pinned_->release(flight.bounce);
          regions_->release(flight.region);
          scatter->done(scatter, ScatterOutcome::gone);
          return true;
        }
      }
      host = flight.bounce;
    }
    flight.note = free_notes_.back();
    free_notes_.pop_back();
    flight.done = events_[flight.note];
    std::byte* const note = notes_ + flight.note * kNoteBytes;
    std::byte* const device = static_cast<std::byte*>(memory_) + (flight.region - regions_->base());

    Move move{};
    move.planes = known->planes;
    move.planes_per_layer = known->planes_per_layer;
    move.block_tokens = cache.shape.block_tokens;
    move.row_bytes = cache.shape.row_bytes;
    move.page_bytes = cache.shape.kind == LayoutKind::opaque ? cache.shape.page_bytes : 0;
    move.cache_layer_begin = cache.shape.part.layer_begin;
    move.cache_layer_end = cache.shape.part.layer_end;
    move.cache_head_begin = cache.shape.part.head_begin;
    move.cache_head_end = cache.shape.part.head_end;
    move.layer_begin = shape.part.layer_begin;
    move.layers = shape.part.layers();
    move.head_begin = shape.part.head_begin;
    move.tokens = shape.tokens;
    move.first_shard = scatter != nullptr ? scatter->first_shard : 0;
    move.shards = shards;
    move.shard_bytes = shape.shard_bytes();
    move.shard_stride = shape.shard_stride();
    move.payload = reinterpret_cast<uint8_t*>(device);
    move.page_digests = reinterpret_cast<uint64_t*>(device + bytes);
    move.pages_done = reinterpret_cast<uint32_t*>(device + bytes + pages * 8);
    move.bad = move.pages_done + shards;
    move.arrived = move.bad + 1;
    std::memcpy(note, blocks.data(), blocks.size() * 4);
    move.blocks = reinterpret_cast<const int32_t*>(note);
    move.shard_digests = reinterpret_cast<uint64_t*>(note + align_up(blocks.size() * 4, 8));
    move.outcome = reinterpret_cast<uint32_t*>(move.shard_digests + shards);

    cudaError_t status;
    if (scatter != nullptr) {
      std::memcpy(move.shard_digests, scatter->header->shard_digests.data() + scatter->first_shard,
                  shards * 8);
      *move.outcome = 2;
      const cudaStream_t stream = load_streams_[next_load_++ % load_streams_.size()];
      status = cudaMemsetAsync(move.pages_done, 0, (shards + 2) * 4, stream);
      if (status == cudaSuccess)
        status = cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream);
      if (status == cudaSuccess) status = launch_scatter(move, secret_, kLoadBlocks, known->aligned, stream);
      if (status == cudaSuccess) status = cudaEventRecord(flight.done, stream);
    } else {
      const cudaStream_t stream = store_streams_[next_store_++ % store_streams_.size()];
      status = cudaMemsetAsync(move.pages_done, 0, (shards + 2) * 4, stream);
      if (status == cudaSuccess) status = launch_gather(move, secret_, kStoreBlocks, known->aligned, stream);
      if (status == cudaSuccess)
        status = cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream);
      if (status == cudaSuccess) status = cudaEventRecord(flight.done, stream);
    }
    if (status != cudaSuccess) {
      log(LogLevel::error, "CUDA: {}", cudaGetErrorString(status));
      end(flight);
      refuse(scatter, gather);
      return true;
    }
    flights_.push_back(flight);
    return true;
  }

  static void refuse(ScatterWork* scatter, GatherWork* gather) {
    if (scatter != nullptr) scatter->done(scatter, ScatterOutcome::gone);
    if (gather != nullptr) gather->done(gather, false);
  }

  void end(const Flight& flight) {
    regions_->release(flight.region);
    if (flight.bounce != nullptr) pinned_->release(flight.bounce);
    free_notes_.push_back(flight.note);
  }

  bool finish_flights() {
    bool any = false;
    for (auto at = flights_.begin(); at != flights_.end();) {
      const cudaError_t status = cudaEventQuery(at->done);
      if (status == cudaErrorNotReady) {
        ++at;
        continue;
      }
      const Flight flight = *at;
      at = flights_.erase(at);
      any = true;
      finish(flight, status);
    }
    return any;
  }

  void finish(const Flight& flight, cudaError_t status) {
    if (status != cudaSuccess) {
      log(LogLevel::error, "CUDA: {}", cudaGetErrorString(status));
      end(flight);
      return refuse(flight.scatter, flight.gather);
    }
    const std::byte* const note = notes_ + flight.note * kNoteBytes;
    if (ScatterWork* work = flight.scatter) {
      const auto* digests = reinterpret_cast<const uint64_t*>(note + align_up(work->blocks.size() * 4, 8));
      const uint32_t outcome = *reinterpret_cast<const volatile uint32_t*>(digests + work->shards);
      end(flight);
      TD_CHECK(outcome < 2);
      return work->done(work, outcome == 0 ? ScatterOutcome::ok : ScatterOutcome::corrupt);
    }
    GatherWork* work = flight.gather;
    std::memcpy(work->digests.data(), note + align_up(work->blocks.size() * 4, 8), work->digests.size() * 8);
    bool ok = true;
    if (flight.bounce != nullptr) {
      auto copy = [&] { std::memcpy(work->payload.data(), flight.bounce, work->payload.size()); };
      if (work->guarded) {
        ok = guard_mapping(work->payload, copy);
      } else {
        copy();
      }
    }
    end(flight);
    work->done(work, ok);
  }

  int ordinal_ = 0;
  void* memory_ = nullptr;
  std::unique_ptr<HostSlab> regions_;  // addresses only: offsets into memory_
  std::unique_ptr<HostSlab> pinned_;
  std::byte* notes_ = nullptr;
  cuda::Secret secret_{};
  std::array<cudaStream_t, 4> load_streams_{};
  std::array<cudaStream_t, 3> store_streams_{};
  uint32_t next_load_ = 0;
  uint32_t next_store_ = 0;
  std::vector<cudaEvent_t> events_;
  std::vector<uint32_t> free_notes_;
  std::map<const PagedCache*, DeviceCache> caches_;
  std::vector<Flight> flights_;

  std::mutex registered_mutex_;
  std::map<uintptr_t, uint64_t> registered_;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<ScatterWork*> scatters_;
  std::deque<GatherWork*> gathers_;
  bool closing_ = false;
  std::thread thread_;
};

}  // namespace

Result<std::unique_ptr<Device>> make_cuda_device(uint32_t ordinal, uint64_t device_slab_bytes,
                                                 uint64_t slab_bytes, uint32_t threads) {
  static_cast<void>(threads);
  auto device = std::make_unique<CudaDevice>();
  if (auto started = device->start(ordinal, device_slab_bytes, slab_bytes); !started)
    return std::unexpected(started.error());
  return device;
}

}  // namespace tokendepot
