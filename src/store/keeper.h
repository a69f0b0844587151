// The background work on all roots of one Depot: tails journals, has space ready, demotes, evicts, tidies up.
//
// Threads: for each root one that tails journals and keeps the own one, so that a file system which does not
// answer holds up no other root; one that has the next segment ready before a store needs it; and one for
// what takes long (copies between roots, leftovers of the dead). Several processes may run keepers on the
// same roots; a lock file makes the changes to segment files one process's at a time, and nothing but time is
// lost when that process dies.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "store/root_writer.h"

namespace tokendepot {

class Keeper {
 public:
  struct Tier {
    Root* root = nullptr;
    Replay* replay = nullptr;
    RootWriter* writer = nullptr;  // null: this process does not write there
  };
  /// `catalog` may be null. `space_ready` is called on a keeper thread when a segment became ready.
  Keeper(std::vector<Tier> tiers, SegmentTable& segments, Catalog* catalog, uint32_t poll_ms,
         std::function<void()> space_ready);
  /// Waits for the threads, however long.
  ~Keeper();

  /// Ends the threads. False: one is still in the kernel after `patience`; this object and all that it uses
  /// must stay for good.
  bool stop(std::chrono::nanoseconds patience);

  /// The tier that takes stores, or null.
  RootWriter* store_target() const;
  /// A segment was used up: prepare the next one now.
  void wake();
  /// One round of journal reading, of all roots, on the caller's thread.
  void poll_journals();

  /// False: the system refused the threads.
  bool running() const;
  uint64_t demoted(RootIndex root) const { return demoted_[root]; }

 private:
  struct Tail {
    Keeper* keeper = nullptr;
    const Tier* tier = nullptr;
    std::thread thread = {};
  };
  void run_tail(const Tier& tier);
  void run_space();
  void poll_journals(const Tier& tier);
  void run_slow();
  void end_thread();
  /// Copies a sealed segment to the next writable tier below unless it is there. False: could not.
  bool demote(size_t tier, uint32_t slot);
  bool is_wanted_below(size_t tier, uint32_t slot, size_t* below) const;
  void make_space_ready();

  const std::vector<Tier> tiers_;
  SegmentTable& segments_;
  Catalog* const catalog_;
  const uint32_t poll_ms_;
  const std::function<void()> space_ready_;
  std::atomic<uint64_t> demoted_[kMaxRoots] = {};

  std::mutex mutex_;
  std::condition_variable wake_tails_;
  std::condition_variable wake_space_;
  std::condition_variable wake_slow_;
  bool woken_ = false;
  std::atomic<bool> stop_ = false;
  size_t at_work_ = 0;  // threads that have not ended
  std::condition_variable ended_;
  std::optional<ErrorKind> last_complaint_;  // the message may name another file each time
  std::vector<std::unique_ptr<Tail>> tails_;
  std::thread space_;
  std::thread slow_;
};

}  // namespace tokendepot
