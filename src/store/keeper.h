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
#include <set>
#include <thread>
#include <vector>

#include "store/promotion.h"
#include "store/rewriting.h"
#include "store/root_writer.h"
#include "store/write_through.h"

namespace tokendepot {

class Keeper {
 public:
  using Tier = Promotion::Tier;
  /// `catalog` may be null. `promotion` and `rewriting` outlive the keeper. `space_ready` is called on a
  /// keeper thread when a segment became ready.
  Keeper(std::vector<Tier> tiers, SegmentTable& segments, Catalog* catalog, Promotion& promotion,
         Rewriting& rewriting, uint32_t poll_ms, std::function<void()> space_ready);
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
  /// Of the segments that this process fills or filled in this root: what would be lost with it, though the
  /// next writable root is to have it, and since when the oldest of it has been there at most.
  struct Lag {
    uint64_t bytes = 0;
    uint64_t since_ns = 0;  // wall clock; 0 = there is none
  };
  Lag demotion_lag(RootIndex root) const;
  /// Where stores into the root that takes them pass through to the next one; null where they do not.
  WriteThrough* write_through() const { return write_through_.get(); }

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
  /// Copies a sealed segment to the next writable tier below unless it is there. `busy`: somebody else is
  /// about to, or there is no room there at this moment; `closed`: the depot is closing.
  Status demote(size_t tier, uint32_t slot);
  /// The copying itself: a whole segment of which `used` bytes are in use.
  Status copy_down(const File& source, const SegmentTable::Segment& segment, uint64_t used, size_t below);
  /// Brings a copy that stores have passed through to, and perhaps not all of them, to its end.
  Status complete_copy(size_t tier, uint32_t slot, size_t below);
  bool is_wanted_below(const SegmentTable::Segment& segment, size_t tier, size_t* below) const;
  std::optional<size_t> tier_below(size_t tier) const;
  size_t tier_of(RootIndex root) const;
  /// Before a segment goes: to the root below, or what is hot of it to where stores go. An error: it must not
  /// go now.
  Status save(size_t tier, uint32_t slot);
  void demote_all();
  void promote();
  void tidy_up();
  /// False: a segment is wanted and there is none.
  bool make_space_ready();
  bool lags_too_much(const Root& root) const;

  const std::vector<Tier> tiers_;
  SegmentTable& segments_;
  Catalog* const catalog_;
  Promotion& promotion_;
  Rewriting& rewriting_;
  const uint32_t poll_ms_;
  const std::function<void()> space_ready_;
  std::atomic<uint64_t> demoted_[kMaxRoots] = {};
  std::unique_ptr<WriteThrough> write_through_;

  std::mutex mutex_;
  std::condition_variable wake_tails_;
  std::condition_variable wake_space_;
  std::condition_variable wake_slow_;
  bool woken_ = false;
  bool lagging_ = false;  // stores are refused until something was demoted
  std::atomic<bool> stop_ = false;
  size_t at_work_ = 0;  // threads that have not ended
  std::condition_variable ended_;
  std::mutex completing_;                               // the one below
  std::set<std::pair<RootIndex, uint32_t>> completed_;  // copies brought to their end
  std::optional<ErrorKind> last_complaint_;             // the message may name another file each time
  std::vector<std::unique_ptr<Tail>> tails_;
  std::thread space_;
  std::thread slow_;
};

}  // namespace tokendepot
