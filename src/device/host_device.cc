#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "base/check.h"
#include "device/host_kernels.h"
#include "device/host_slab.h"
#include "device/stream_copy.h"
#include "io/io_thread.h"
#include "io/mapping.h"

namespace tokendepot {
namespace {

template <typename Work>
class WorkQueue {
 public:
  void push(Work* work) {
    work->next = nullptr;
    *tail_ = work;
    tail_ = &work->next;
  }
  Work* pop() {
    Work* work = head_;
    if (work == nullptr) return nullptr;
    head_ = work->next;
    if (head_ == nullptr) tail_ = &head_;
    work->next = nullptr;
    return work;
  }
  bool empty() const { return head_ == nullptr; }

 private:
  Work* head_ = nullptr;
  Work** tail_ = &head_;
};

void run(ScatterWork* work) {
  ScatterOutcome outcome = ScatterOutcome::gone;
  auto kernel = [work, &outcome] { outcome = verify_and_scatter(*work); };
  if (!work->guarded) {
    kernel();
  } else if (!guard_mapping(work->payload, kernel)) {
    outcome = ScatterOutcome::gone;
    stream_fence();  // the kernel did not reach its own
  }
  work->done(work, outcome);
}

void run(GatherWork* work) {
  bool ok = true;
  auto kernel = [work] { gather_and_digest(*work); };
  if (!work->guarded) {
    kernel();
  } else if (!guard_mapping(work->payload, kernel)) {
    ok = false;
    stream_fence();
  }
  work->done(work, ok);
}

class HostDevice final : public Device {
 public:
  HostDevice(uint32_t threads, uint64_t slab_bytes) : slab_(slab_bytes), thread_count_(threads) {
    TD_CHECK(threads >= 1 && threads <= 64);
  }

  /// Once, right after construction: all threads, or an error.
  Status start() {
    threads_.reserve(thread_count_);
    for (uint32_t i = 0; i < thread_count_; ++i) {
      std::thread thread =
          start_io_thread([](void* self) { static_cast<HostDevice*>(self)->serve(); }, this, "td-dev");
      if (!thread.joinable()) return thread_refused("the host device's threads");
      threads_.push_back(std::move(thread));
    }
    return {};
  }

  ~HostDevice() override {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return running_ == 0; });
  }

  DeviceUse stats() const override {
    DeviceUse stats;
    stats.name = "host";
    stats.threads = thread_count_;
    return stats;
  }
  Slab& slab() override { return slab_; }
  void submit(ScatterWork* work) override { queue(scatters_, work); }
  void submit(GatherWork* work) override { queue(gathers_, work); }
  bool takes_page_digests() const override { return true; }
  bool run_here(ScatterWork* work) override {
    TD_CHECK(work->done != nullptr);
    std::unique_lock lock(mutex_);
    if (running_ == thread_count_ || !scatters_.empty()) return false;
    run_counted(lock, work);
    // Threads that kept the bound, or the destructor. Nothing else waits for the end of a work: a thread
    // takes the next one itself.
    if (!scatters_.empty() || !gathers_.empty() || closing_) wake_.notify_all();
    return true;
  }

 private:
  template <typename Work>
  void queue(WorkQueue<Work>& to, Work* work) {
    TD_CHECK(work->done != nullptr);
    // Notified under the lock: once `done` was called the owner may destroy the device, which waits for the
    // lock.
    const std::lock_guard lock(mutex_);
    to.push(work);
    wake_.notify_one();
  }

  void serve() {
    std::unique_lock lock(mutex_);
    while (true) {
      if (running_ == thread_count_) {
        wake_.wait(lock);
      } else if (ScatterWork* scatter = scatters_.pop()) {
        run_counted(lock, scatter);
      } else if (GatherWork* gather = gathers_.pop()) {
        run_counted(lock, gather);
      } else if (closing_) {
        return;
      } else {
        wake_.wait(lock);
      }
    }
  }

  template <typename Work>
  void run_counted(std::unique_lock<std::mutex>& lock, Work* work) {
    ++running_;
    lock.unlock();
    run(work);
    lock.lock();
    --running_;
  }

  HostSlab slab_;
  const uint32_t thread_count_;
  std::mutex mutex_;
  std::condition_variable wake_;
  WorkQueue<ScatterWork> scatters_;
  WorkQueue<GatherWork> gathers_;
  bool closing_ = false;
  size_t running_ = 0;  // works under way, on these threads or in run_here(): at most as many as threads
  std::vector<std::thread> threads_;
};

}  // namespace

Result<std::unique_ptr<Device>> make_host_device(uint32_t threads, uint64_t slab_bytes) {
  auto device = std::make_unique<HostDevice>(threads, slab_bytes);
  if (auto started = device->start(); !started) return std::unexpected(started.error());
  return device;
}

}  // namespace tokendepot
