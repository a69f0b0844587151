// Promotion: what is loaded from a lower root is copied to the first writable one, in the background.
//
// Copies go into segments of their own, which are never demoted: the original stays where it is, so a copy
// costs the lower root nothing and its loss no hit. Why extents and not segments, and when a copy pays:
// docs/decisions.md.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "base/clock.h"
#include "format/journal.h"
#include "store/extent_use.h"
#include "store/replay.h"
#include "store/root_writer.h"

namespace tokendepot {

class Promotion {
 public:
  struct Tier {
    Root* root = nullptr;
    Replay* replay = nullptr;
    RootWriter* writer = nullptr;  // null: this process does not write there
  };
  Promotion(std::vector<Tier> tiers, SegmentTable& segments, const Clock& clock);

  /// An extent was loaded from tier `tier`. `stored_at_ns` as its header says. Any thread; a bounded queue:
  /// what finds it full is promoted another time.
  void note_load(size_t tier, uint32_t slot, const Record& put, uint64_t stored_at_ns);

  /// Copies what is worth it while nothing else is in motion in this process; what has waited for longer
  /// than 10 s is left. Each piece is followed by a rest of the time it took, so that no more than half of
  /// what is spare is used. `before_eviction` as for RootWriter. One thread at a time.
  void run_round(const BeforeEviction& before_eviction, const std::atomic<bool>& stop);

  const ExtentUse& use() const { return use_; }
  uint64_t extents() const { return extents_; }
  uint64_t bytes() const { return bytes_; }

 private:
  struct Candidate {
    size_t tier = 0;
    uint32_t slot = 0;
    Record put;
    uint64_t used_before_ns = 0;
    uint64_t noted_ns = 0;  // steady clock
  };
  std::optional<Candidate> next();
  bool pays(const Candidate& candidate) const;
  bool has_copy(const Candidate& candidate);
  /// Waits until nothing but `own` is in motion. False: not for long, or not any more.
  bool wait_for_rest(const std::atomic<bool>& stop, uint32_t own) const;
  void promote(const Candidate& candidate, const BeforeEviction& before_eviction,
               const std::atomic<bool>& stop);

  const std::vector<Tier> tiers_;
  SegmentTable& segments_;
  const Clock& clock_;
  size_t top_ = 0;  // the first tier with a writer; tiers_.size() = none
  ExtentUse use_;
  std::atomic<uint64_t> extents_ = 0;
  std::atomic<uint64_t> bytes_ = 0;
  std::mutex mutex_;  // waiting_
  std::deque<Candidate> waiting_;
  // By slot and page of the original; of run_round()'s thread alone. The catalogs of other processes learn of
  // a copy with their next poll and until then send loads to the original.
  std::map<std::pair<uint32_t, uint64_t>, uint32_t> copies_;
};

}  // namespace tokendepot
