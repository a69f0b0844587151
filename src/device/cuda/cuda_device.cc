// The CUDA device: extents go between host memory (mapped segments, or the pinned slab) and the paged cache
// in one copy and one or two kernels each, several in flight.
//
// Threads: one starts and finishes flights and never waits for a copy of the CPU; one registers mapped
// segments; `threads` copy payloads that are not registered (yet) and report stores. All calls of the driver
// are made by them, but for mark(), accept() and who calls enter_thread(): a thread of the engine keeps the
// device that it has.
#include "device/cuda/cuda_device.h"

#include <cuda_runtime_api.h>
#include <sys/prctl.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/errors.h"
#include "base/log.h"
#include "device/cuda/caches.h"
#include "device/cuda/convoy.h"
#include "device/cuda/copiers.h"
#include "device/cuda/flight.h"
#include "device/cuda/holdings.h"
#include "device/cuda/marks.h"
#include "device/cuda/registry.h"
#include "device/cuda/status.h"
#include "device/range_slab.h"
#include "io/io_thread.h"

namespace tokendepot {
namespace {

using cuda::digest_bytes;
using cuda::Flight;
using cuda::Holdings;
using cuda::kLoadLanes;
using cuda::kMostInFlight;
using cuda::kNoteBytes;
using cuda::kStoreLanes;
using cuda::Needs;
using cuda::needs_of;

constexpr auto kLook = std::chrono::microseconds(15);  // how often flights are asked whether they have landed
constexpr uint32_t kMostStoreConvoys = 3;              // one copies, the others have gathered or gather
constexpr uint32_t kMostStoresInFlight = 48;           // they may wait for a step of the engine
// The engine may be waiting for a store, and however many loads there are, they use the link's other way.
constexpr uint32_t kStoresBesideLoads = 1;
constexpr uint64_t kMostStoreConvoyBytes = 16 << 20;  // longer copies are no faster
constexpr uint64_t kGpuPageBytes = 64 << 10;          // what the driver pins for storage
// One is under way and one waits for the link: of more, the GPU's copy engine does several at once and loses
// up to 10 % of the rate. What comes meanwhile gathers to the next convoy; started at once it would have no
// neighbours.
constexpr size_t kMostCopies = 2;

class CudaDevice final : public Device, public cuda::CopierReports {
 public:
  CudaDevice(uint32_t ordinal, uint64_t device_slab_bytes, uint64_t slab_bytes, uint32_t threads)
      : ordinal_(static_cast<int>(ordinal)),
        slab_bytes_(device_slab_bytes),
        host_slab_bytes_(slab_bytes),
        copier_threads_(threads) {}

  ~CudaDevice() override {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
      wake_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
  }

  /// Starts the device's own thread and returns what became of everything that it makes first.
  Status start() {
    thread_ = start_io_thread([](void* self) { static_cast<CudaDevice*>(self)->run(); }, this, "td-dev");
    if (!thread_.joinable()) return thread_refused("the CUDA device's thread");
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return made_.has_value(); });
    return *made_;
  }

  DeviceUse stats() const override {
    DeviceUse stats;
    stats.name = fmt::format("cuda:{}", ordinal_);
    stats.slab_bytes = slab_bytes_;
    stats.pinned_bytes = held_->pinned->size() + kNoteBytes * kMostInFlight + copiers_->pinned_bytes();
    stats.registered_bytes = registry_->registered_bytes();
    stats.threads = 2 + copiers_->threads();
    return stats;
  }
  Slab& slab() override { return *held_->pinned; }

  // Notified under the lock: once `done` was called the owner may destroy the device.
  void submit(ScatterWork* work) override {
    const std::lock_guard lock(mutex_);
    scatters_.push_back(work);
    wake_.notify_one();
  }
  void submit(GatherWork* work) override {
    const std::lock_guard lock(mutex_);
    gathers_.push_back(work);
    wake_.notify_one();
  }

  Result<uint64_t> mark(void* stream) override { return marks_->mark(static_cast<cudaStream_t>(stream)); }
  void engine_step(bool begins) override { begins ? busy_.step_begins() : busy_.step_ends(); }
  bool on_host() const override { return false; }

  Status accept(const PagedCache& cache) override {
    const GroupShape& shape = cache.shape;
    const Needs needs = needs_of(shape.payload_bytes(), shape.shards(), shape.blocks());
    if (needs.region_bytes > regions_->size()) {
      return fail(ErrorKind::invalid_argument,
                  "device_slab={}{} is smaller than one extent of group {} with its digests ({} bytes)",
                  slab_bytes_, file_slab_ ? ", half of which is for cuFile," : "", shape.group,
                  needs.region_bytes);
    }
    if (needs.note_bytes > kNoteBytes || !cuda::fits_kernels(shape)) {
      return fail(ErrorKind::unsupported,
                  "group {}: {} blocks and {} shards of {} bytes in one extent are more than fit",
                  shape.group, shape.blocks(), shape.shards(), shape.shard_bytes());
    }
    return cuda::check_memory(cache, ordinal_);
  }

  bool registers_mappings() const override { return true; }
  void adopt(std::span<std::byte> mapping, bool writable, uint64_t heat) override {
    registry_->adopt(mapping, writable, heat);
  }
  void release(Mapping mapping) override { registry_->release(std::move(mapping)); }

  Slab* make_file_slab() override {
    TD_CHECK(!file_slab_);
    auto* const memory = static_cast<std::byte*>(held_->memory);
    const uint64_t half = slab_bytes_ / 2 / kGpuPageBytes * kGpuPageBytes;
    regions_ = std::make_unique<RangeSlab>(memory + half, slab_bytes_ - half);
    file_slab_ = std::make_unique<RangeSlab>(memory, half);
    return file_slab_.get();
  }
  void drop_file_slab() override {
    file_slab_.reset();
    regions_ = std::make_unique<RangeSlab>(static_cast<std::byte*>(held_->memory), slab_bytes_);
  }
  bool copy_from_file_slab(std::byte* to, const std::byte* from, uint64_t bytes) override {
    const cudaError_t status = held_->copy_to_host(ordinal_, to, from, bytes);
    if (status != cudaSuccess) complain(status);
    return status == cudaSuccess;
  }
  void enter_thread() override { (void)cuda::enter_device(ordinal_); }

 private:
  void run() {
    Status made = make();
    const bool good = made.has_value();
    {
      const std::lock_guard lock(mutex_);
      made_ = std::move(made);
      wake_.notify_all();
    }
    if (good) serve();
    unmake();
  }

  Status make() {
    auto held = Holdings::make(ordinal_, slab_bytes_, host_slab_bytes_);
    if (!held) return std::unexpected(held.error());
    held_ = std::move(*held);
    regions_ = std::make_unique<RangeSlab>(static_cast<std::byte*>(held_->memory), slab_bytes_);
    if (regions_->size() == 0)
      return fail(ErrorKind::no_space, "device_slab={} holds no whole page", slab_bytes_);
    for (Flight& flight : held_->flights) free_.push_back(&flight);
    caches_ = std::make_unique<cuda::Caches>(held_->descriptions());
    marks_ = std::make_unique<cuda::Marks>(ordinal_);
    if (auto s = marks_->start(); !s) return s;
    copiers_ = std::make_unique<cuda::Copiers>(ordinal_, *this);
    if (auto s = copiers_->start(copier_threads_); !s) return s;
    std::memcpy(secret_.words, XXH3_kSecret, sizeof secret_.words);
    registry_ = std::make_unique<cuda::Registry>(ordinal_, busy_);
    if (!registry_->running()) return thread_refused("the CUDA device's second thread");
    return {};
  }

  void unmake() {
    copiers_.reset();
    registry_.reset();
    marks_.reset();
    caches_.reset();
    held_.reset();
  }

  // --- the device's thread: starts flights, loads before all stores but one, and finishes them
  // ------------------------------------------------------------------------------------------------------

  void serve() {
    ::prctl(PR_SET_TIMERSLACK, 1'000);  // nanoseconds; the ordinary 50 us is as long as a flight of 2 MiB
    std::unique_lock lock(mutex_);
    while (true) {
      bool progress = false;
      while (take_next(lock)) progress = true;
      for (Flight* flight : copied_) flying_[flight->lane].push_back(flight);
      copied_.clear();
      if (std::ranges::any_of(flying_, [](const auto& lane) { return !lane.empty(); })) {
        lock.unlock();
        progress |= finish_flights();
        if (!progress) std::this_thread::sleep_for(kLook);
        lock.lock();
      } else if (!progress) {
        if (closing_ && free_.size() == kMostInFlight && scatters_.empty() && gathers_.empty()) return;
        if (scatters_.empty() && gathers_.empty()) {
          wake_.wait(lock);
        } else {
          // A copier may have given back just then what was missing.
          wake_.wait_for(lock, std::chrono::milliseconds(1));
        }
      }
    }
  }

  bool take_next(std::unique_lock<std::mutex>& lock) {
    if (free_.empty()) return false;
    const uint32_t stores = scatters_.empty() ? kMostStoresInFlight : kStoresBesideLoads;
    if (!gathers_.empty() && stores_in_flight_ < stores && storing_ < kMostStoreConvoys) {
      take_stores_locked(stores - stores_in_flight_);
      if (start_convoy(lock)) return true;
    }
    if (scatters_.empty() || copying_.size() >= kMostCopies) return false;
    take_loads_locked();
    return start_convoy(lock);
  }

  /// False: no room in the device's slab; try again when a flight has ended.
  bool start_convoy(std::unique_lock<std::mutex>& lock) {
    const bool load = convoy_.front()->scatter != nullptr;
    lock.unlock();
    Start start = prepare();
    lock.lock();
    if (start == Start::alone) {
      leave_convoy_locked(1);
      lock.unlock();
      start = prepare();
      lock.lock();
    }
    if (start == Start::later) {
      leave_convoy_locked(0);
      return false;
    }
    lock.unlock();
    if (start == Start::ready) load ? launch_loads() : launch_stores();
    lock.lock();
    return true;
  }

  void take_stores_locked(size_t most) {
    convoy_.clear();
    most = std::min({most, free_.size(), size_t{kMostStoresInFlight / kMostStoreConvoys}});
    const uint64_t most_bytes = std::min(kMostStoreConvoyBytes, most_convoy_bytes());
    for (size_t length = cuda::convoy_length(gathers_, most, most_bytes); length > 0; --length) {
      Flight& flight = take_flight_locked();
      flight.gather = gathers_.front();
      gathers_.pop_front();
      ++stores_in_flight_;
      convoy_.push_back(&flight);
    }
  }

  /// The first load and its neighbours.
  void take_loads_locked() {
    convoy_.clear();
    for (size_t length = cuda::convoy_length(scatters_, free_.size(), most_convoy_bytes()); length > 0;
         --length) {
      Flight& flight = take_flight_locked();
      flight.scatter = scatters_.front();
      scatters_.pop_front();
      convoy_.push_back(&flight);
    }
  }

  /// All but the first `keep` go back to the head of the queue.
  void leave_convoy_locked(size_t keep) {
    while (convoy_.size() > keep) {
      Flight& flight = *convoy_.back();
      convoy_.pop_back();
      if (flight.scatter != nullptr) {
        scatters_.push_front(flight.scatter);
      } else {
        gathers_.push_front(flight.gather);
      }
      give_back_locked(flight);
    }
  }

  uint64_t most_convoy_bytes() const { return std::min(cuda::kMostConvoyBytes, regions_->size() / 8); }

  Flight& take_flight_locked() {
    Flight& flight = *free_.back();
    free_.pop_back();
    return flight;
  }

  enum class Start : uint8_t {
    ready,
    later,  // no room in the slab now
    alone,  // the convoy's payloads cannot be copied as one
    ended   // nothing is left to launch
  };

  /// Of the convoy: ends what never can be done, and finds room and the way for the rest.
  Start prepare() {
    const size_t unfit = std::erase_if(convoy_, [this](Flight* flight) {
      if (find_cache(*flight)) return false;
      end(*flight, ScatterOutcome::failed);
      return true;
    });
    if (convoy_.empty()) return Start::ended;
    Flight& first = *convoy_.front();
    const bool load = first.scatter != nullptr;
    if (!load && unfit > 0 && convoy_.size() > 1) return Start::alone;  // its rows have a gap now
    Flight& last = *convoy_.back();
    const std::span<std::byte> begin = job_of(first).payload, back = job_of(last).payload;
    const bool on_device = job_of(first).on_device;
    const std::span<std::byte> span(begin.data(), back.data() + back.size());
    uint64_t bytes = on_device ? 0 : span.size();
    for (const Flight* flight : convoy_) bytes += digest_bytes(job_of(*flight).payload.size());
    first.pieces.clear();
    if (on_device) {
      first.reached = true;
    } else if (is_in_slab(span)) {
      first.reached = true;
      first.pieces.assign(1, span);
    } else {
      first.reached = registry_->cut(span.data(), span.size(), first.pieces);
      if (!first.reached) first.pieces.clear();
      // Rows of one copy cannot lie in two registrations.
      const bool as_one = first.reached && (load || first.pieces.size() == 1);
      if (!as_one && convoy_.size() > 1) return Start::alone;
    }
    std::byte* const region = regions_->allocate(bytes);
    if (region == nullptr) return Start::later;
    const uint32_t lane = load ? next_load_++ % kLoadLanes : kLoadLanes + next_store_++ % kStoreLanes;
    std::byte* digests = on_device ? region : region + span.size();
    for (Flight* flight : convoy_) {
      const cuda::Job job = job_of(*flight);
      flight->payload = job.payload;
      flight->reached = first.reached;
      flight->lane = lane;
      flight->stream = held_->streams[lane];
      flight->lands_with = &last;
      describe(job, *flight->cache,
               on_device ? job.payload.data() : region + (job.payload.data() - span.data()), digests,
               *flight);
      digests += digest_bytes(job.payload.size());
    }
    last.region = region;
    return Start::ready;
  }

  bool find_cache(Flight& flight) {
    const cuda::Job job = job_of(flight);
    const Needs needs = needs_of(job.payload.size(), job.shards, job.blocks.size(), job.on_device);
    if (needs.region_bytes > regions_->size() || needs.note_bytes > kNoteBytes ||
        !cuda::fits_kernels(job.shape))
      return false;
    cudaError_t status = clear(flight);
    if (status == cudaSuccess) status = caches_->find_or_add(*job.cache, held_->setup_stream, &flight.cache);
    if (status != cudaSuccess) complain(status);
    return status == cudaSuccess;
  }

  /// What give_up() could not.
  cudaError_t clear(Flight& flight) {
    if (!flight.stale) return cudaSuccess;
    cudaError_t status = cudaMemsetAsync(flight.counters, 0, sizeof(cuda::Counters), held_->setup_stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(held_->setup_stream);
    flight.stale = status != cudaSuccess;
    return status;
  }

  void launch_stores() {
    Flight& first = *convoy_.front();
    Flight& last = *convoy_.back();
    cudaError_t status = cudaSuccess;
    for (const Flight* flight : convoy_) {
      if (status == cudaSuccess) status = queue_gather(*flight);
    }
    if (status == cudaSuccess) status = queue_copy_out(first);
    if (status == cudaSuccess) status = cudaEventRecord(last.done, first.stream);
    if (status == cudaSuccess) ++storing_;
    land_later(status);
  }

  /// The convoy's flights, or their end if they could not be launched.
  void land_later(cudaError_t status) {
    for (Flight* flight : convoy_) {
      if (status != cudaSuccess) {
        give_up(*flight, status);
      } else {
        flying_[flight->lane].push_back(flight);
      }
    }
  }

  void launch_loads() {
    Flight& first = *convoy_.front();
    if (!first.reached) {
      ++busy_.loads;
      copiers_->copy_in(first);
      return;
    }
    Flight& last = *convoy_.back();
    cudaError_t status = cudaSuccess;
    std::byte* to = first.device;
    for (const std::span<std::byte> piece : first.pieces) {
      if (status == cudaSuccess)
        status = cudaMemcpyAsync(to, piece.data(), piece.size(), cudaMemcpyHostToDevice, first.stream);
      to += piece.size();
    }
    const bool copies = !first.pieces.empty();
    if (copies && status == cudaSuccess) status = cudaEventRecord(last.copied, first.stream);
    for (Flight* flight : convoy_) {
      if (status == cudaSuccess) status = queue_scatter(*flight);
    }
    if (status == cudaSuccess) status = cudaEventRecord(last.done, first.stream);
    if (copies && status == cudaSuccess) {
      copying_.push_back(&last);
      ++busy_.loads;
    }
    land_later(status);
  }

  cudaError_t queue_scatter(const Flight& flight) {
    // Only the last kernel touches the cache: the others need not wait for the engine.
    cudaError_t status = cuda::launch_verify(flight.move, secret_, flight.stream);
    if (status == cudaSuccess) status = marks_->wait(flight.stream, flight.scatter->after);
    if (status == cudaSuccess) status = cuda::launch_scatter(flight.move, flight.aligned, flight.stream);
    return status;
  }

  cudaError_t queue_gather(const Flight& flight) {
    cudaError_t status = marks_->wait(flight.stream, flight.gather->after);
    if (status == cudaSuccess)
      status = cuda::launch_gather(flight.move, secret_, flight.aligned, flight.stream);
    return status;
  }

  /// Behind the gathers of the convoy, which `first` leads: its payloads, and nothing of what lies between
  /// them.
  cudaError_t queue_copy_out(const Flight& first) {
    if (convoy_.size() > 1) {
      const auto pitch = static_cast<size_t>(convoy_[1]->payload.data() - first.payload.data());
      return cudaMemcpy2DAsync(first.payload.data(), pitch, first.device, pitch, first.payload.size(),
                               convoy_.size(), cudaMemcpyDeviceToHost, first.stream);
    }
    cudaError_t status = cudaSuccess;
    const std::byte* from = first.device;
    for (const std::span<std::byte> piece : first.pieces) {
      if (status == cudaSuccess)
        status = cudaMemcpyAsync(piece.data(), from, piece.size(), cudaMemcpyDeviceToHost, first.stream);
      from += piece.size();
    }
    return status;
  }

  bool finish_flights() {
    const size_t copied = std::erase_if(
        copying_, [](const Flight* flight) { return cudaEventQuery(flight->copied) != cudaErrorNotReady; });
    busy_.loads -= copied;
    bool any = copied > 0;
    for (std::deque<Flight*>& lane : flying_) {
      while (!lane.empty()) {
        Flight& flight = *lane.front();
        const cudaError_t status = cudaEventQuery(flight.lands_with->done);
        if (status == cudaErrorNotReady) break;  // those behind it come later
        lane.pop_front();
        busy_.loads -= std::erase(copying_, &flight);
        if (flight.gather != nullptr && flight.lands_with == &flight) --storing_;
        any = true;
        if (status != cudaSuccess) {
          give_up(flight, status);
        } else {
          finish(flight);
        }
      }
    }
    return any;
  }

  void finish(Flight& flight) {
    if (flight.scatter != nullptr) {
      const uint32_t outcome = *static_cast<const volatile uint32_t*>(flight.note_outcome);
      if (outcome == cuda::kNoOutcome) return end(flight, ScatterOutcome::failed);
      return end(flight, outcome == 0 ? ScatterOutcome::ok : ScatterOutcome::corrupt);
    }
    const std::span<uint64_t> digests = flight.gather->digests;
    std::memcpy(digests.data(), flight.note_digests, digests.size_bytes());
    copiers_->land(flight);
  }

  // --- the copiers
  // ------------------------------------------------------------------------------------------------------

  void copied_in(Flight& flight, cuda::Bounce::Copied how, cudaError_t failure) override {
    --busy_.loads;
    if (how == cuda::Bounce::Copied::failed) return give_up(flight, failure);
    if (how == cuda::Bounce::Copied::gone) {
      (void)cudaStreamSynchronize(flight.stream);  // other parts of it may be on their way to the region
      return end(flight, ScatterOutcome::gone);
    }
    cudaError_t status = queue_scatter(flight);
    if (status == cudaSuccess) status = cudaEventRecord(flight.done, flight.stream);
    if (status != cudaSuccess) return give_up(flight, status);
    const std::lock_guard lock(mutex_);
    copied_.push_back(&flight);
    wake_.notify_one();
  }

  void stored(Flight& flight, cuda::Bounce::Copied how) override {
    if (how == cuda::Bounce::Copied::failed) return give_up(flight, cudaGetLastError());
    end(flight, how == cuda::Bounce::Copied::ok ? ScatterOutcome::ok : ScatterOutcome::gone);
  }

  // --- any of them
  // ------------------------------------------------------------------------------------------------------

  /// Once a kind: after an error that stays, every extent has it.
  void complain(cudaError_t status) {
    if (last_error_.exchange(status) != status)
      log(LogLevel::error, "cuda:{}: {}; extents are recomputed", ordinal_, cudaGetErrorString(status));
  }

  void give_up(Flight& flight, cudaError_t status) {
    complain(status);
    // A verify without its scatter leaves what it found, and the next extent of this flight would have it.
    flight.stale = cudaMemsetAsync(flight.counters, 0, sizeof(cuda::Counters), flight.stream) != cudaSuccess;
    (void)cudaStreamSynchronize(flight.stream);  // what was queued before it failed still uses the region
    end(flight, ScatterOutcome::failed);
  }

  /// Gives back what the flight holds, then reports its work.
  void end(Flight& flight, ScatterOutcome outcome) {
    ScatterWork* const scatter = flight.scatter;
    GatherWork* const gather = flight.gather;
    if (flight.region != nullptr) regions_->release(std::exchange(flight.region, nullptr));
    {
      const std::lock_guard lock(mutex_);
      give_back_locked(flight);
      wake_.notify_one();
    }
    if (scatter != nullptr) {
      scatter->done(scatter, outcome);
    } else {
      gather->done(gather, outcome == ScatterOutcome::ok);
    }
  }

  void give_back_locked(Flight& flight) {
    if (flight.gather != nullptr) --stores_in_flight_;
    flight.scatter = nullptr;
    flight.gather = nullptr;
    free_.push_back(&flight);
  }

  bool is_in_slab(std::span<const std::byte> payload) const {
    const HostSlab& slab = *held_->pinned;
    const std::byte* const end = slab.base() + slab.size();
    return payload.data() >= slab.base() && payload.data() + payload.size() <= end;
  }

  const int ordinal_;
  const uint64_t slab_bytes_;
  const uint64_t host_slab_bytes_;
  const uint32_t copier_threads_;

  // Made by the device's thread before start() returns.
  std::unique_ptr<Holdings> held_;
  std::unique_ptr<RangeSlab> regions_;    // of the device's memory
  std::unique_ptr<RangeSlab> file_slab_;  // the rest of it; null unless asked for
  cuda::Secret secret_{};
  std::unique_ptr<cuda::Marks> marks_;
  cuda::Busy busy_;
  std::unique_ptr<cuda::Registry> registry_;
  std::unique_ptr<cuda::Copiers> copiers_;

  // The device's thread only.
  std::vector<Flight*> convoy_;   // being started: neighbours, in the order of their payloads
  std::vector<Flight*> copying_;  // the last ones of convoys whose copy has not ended
  std::array<std::deque<Flight*>, kLoadLanes + kStoreLanes>
      flying_;  // their events tell when they have landed
  std::unique_ptr<cuda::Caches> caches_;
  uint32_t next_load_ = 0;
  uint32_t next_store_ = 0;
  uint32_t storing_ = 0;  // convoys of stores that have not landed

  std::atomic<cudaError_t> last_error_ = cudaSuccess;
  std::mutex mutex_;  // everything below
  std::condition_variable wake_;
  std::optional<Status> made_;
  std::deque<ScatterWork*> scatters_;
  std::deque<GatherWork*> gathers_;
  std::vector<Flight*> free_;
  std::vector<Flight*> copied_;  // in by a copier, for the device's thread to watch
  uint32_t stores_in_flight_ = 0;
  bool closing_ = false;
  std::thread thread_;
};

}  // namespace

Result<std::unique_ptr<Device>> make_cuda_device(uint32_t ordinal, uint64_t device_slab_bytes,
                                                 uint64_t slab_bytes, uint32_t threads) {
  auto device = std::make_unique<CudaDevice>(ordinal, device_slab_bytes, slab_bytes, threads);
  if (auto started = device->start(); !started) return std::unexpected(started.error());
  return device;
}

}  // namespace tokendepot
