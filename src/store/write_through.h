// Stores that pass through: what was stored in one root is written to the same place of a copy of its segment
// in the next root, extent by extent, before the store counts as done.
//
// The copy has the segment's name from its first extent on and stays locked by its writer, so that nobody
// seals (and then evicts) it while it grows; demotion brings it to its end. One thread; what waits is bounded
// by who submits. A next root that takes nothing for kPatienceNs fails the store, which the first root keeps.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "base/clock.h"
#include "store/root_writer.h"

namespace tokendepot {

/// Thread-safe.
class WriteThrough {
 public:
  static constexpr uint64_t kPatienceNs = 5ull * 1000 * 1000 * 1000;

  /// From `from`'s root to `to`'s; both outlive it. `before_eviction` as for RootWriter, of `to`.
  WriteThrough(Root& from, RootWriter& to, SegmentTable& segments, const Clock& clock,
               BeforeEviction before_eviction);
  /// Waits for the thread, however long.
  ~WriteThrough();
  /// Fails what waits and ends the thread. False: it is still in the kernel after `patience`.
  bool stop(std::chrono::nanoseconds patience);
  /// False: the system refused the thread.
  bool running() const { return thread_.joinable(); }

  /// One acknowledged extent. Its owner keeps it, and the segment in use, until `done` was called.
  struct Passage {
    uint32_t slot = 0;
    Record put;
    void* owner = nullptr;
    void (*done)(Passage* self, bool stored) = nullptr;  // on the thread of this object, or of stop()
    uint64_t submitted_ns = 0;
  };
  void submit(Passage* passage);
  /// Lets go of a segment's copy, of which nothing is on its way any more.
  void release(const SegmentId& id);

 private:
  void run();
  Status pass(const Passage& passage);
  /// The copy of a segment, open and locked: begun where there is none.
  Result<std::shared_ptr<File>> copy_of(const Passage& passage);

  Root& from_;
  RootWriter& to_;
  SegmentTable& segments_;
  const Clock& clock_;
  const BeforeEviction before_eviction_;
  std::unique_ptr<std::byte, void (*)(void*)> piece_;

  std::mutex mutex_;  // all below
  std::condition_variable wake_;
  std::condition_variable ended_;
  std::deque<Passage*> waiting_;
  std::map<SegmentId, std::shared_ptr<File>> copies_;
  bool complained_ = false;
  bool has_ended_ = false;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

}  // namespace tokendepot
