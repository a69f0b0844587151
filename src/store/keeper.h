// The background work on all roots of one Depot: tails journals, has space ready, demotes, evicts, tidies up.
//
// Two threads: one for what a store may soon wait for (journals, the next segment), one for what takes long
// (copies between roots, leftovers of the dead). Several processes may run keepers on the same roots; a lock
// file makes the changes to segment files one process's at a time, and nothing but time is lost when that
// process dies.
#pragma once

#include <atomic>
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
  ~Keeper();

  /// The tier that takes stores, or null.
  RootWriter* store_target() const;
  /// A segment was used up: prepare the next one now.
  void wake();
  /// One round of journal reading on the caller's thread.
  void poll_journals();

  /// False: the system refused the threads.
  bool running() const { return fast_.joinable() && slow_.joinable(); }
  uint64_t demoted(RootIndex root) const { return demoted_[root]; }

 private:
  void run_fast();
  void run_slow();
  /// Copies a sealed segment to the next writable tier below unless it is there. False: could not.
  bool demote(size_t tier, uint32_t slot);
  bool is_wanted_below(size_t tier, uint32_t slot, size_t* below) const;
  void make_space_ready();
  /// Obeys the roots' policies: at most once a second.
  void tend_policies();

  const std::vector<Tier> tiers_;
  SegmentTable& segments_;
  Catalog* const catalog_;
  const uint32_t poll_ms_;
  const std::function<void()> space_ready_;
  std::atomic<uint64_t> demoted_[kMaxRoots] = {};

  std::mutex mutex_;
  std::condition_variable wake_fast_;
  std::condition_variable wake_slow_;
  bool woken_ = false;
  uint64_t policies_due_ns_ = 0;  // fast thread only
  std::atomic<bool> stop_ = false;
  std::optional<ErrorKind> last_complaint_;  // the message may name another file each time
  std::thread fast_;
  std::thread slow_;
};

}  // namespace tokendepot
