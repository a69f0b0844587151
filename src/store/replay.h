// Tails all journals of one root into the segment table and, where there is one, the catalog.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "base/clock.h"
#include "store/catalog.h"
#include "store/journal_file.h"
#include "store/root.h"
#include "store/root_policies.h"
#include "store/segment_contents.h"
#include "store/segment_table.h"

namespace tokendepot {

/// Thread-safe: one mutex for reading journals, one for applying records.
class Replay {
 public:
  /// `catalog` may be null: then puts count for their segments only.
  Replay(Root& root, SegmentTable& segments, Catalog* catalog);

  /// Reads everything, then drops what the journals speak of but the directory does not hold.
  Status first();
  /// Reads what was appended since. Never fails: what cannot be read now is read at the next poll.
  void poll();

  /// Applies a record that this process wrote itself (its own journal is not tailed).
  void apply(const Record& record);
  /// The journal is from now on written by this process.
  void take_over(uint64_t writer);
  /// Reads another writer's journal to its end now. Returns the index behind its last good record.
  /// Errors: it is not known, or could not be read to its end (then nobody may cut off the rest).
  Result<uint64_t> catch_up(uint64_t writer);
  /// The writers of all journals found so far, this process's own left out.
  std::vector<uint64_t> writers() const;

  /// Reads the root's policies if they changed and judges its segments by them. Not again before twenty times
  /// as long as the last judgement took.
  void tend(const Clock& clock);
  RootPolicies& policies() { return policies_; }
  const RootPolicies& policies() const { return policies_; }
  bool is_condemned(uint32_t slot, uint64_t offset);
  /// Bytes of extents that were condemned since first(): by this process, and by hand from outside.
  EvictedBytes evicted() const;

  uint64_t records() const { return records_; }
  uint64_t bad_records() const { return bad_records_; }
  /// A segment was condemned since the last call: its catalog entries want sweeping.
  bool take_condemned() { return condemned_.exchange(false); }

 private:
  void find_journals();
  Status read(JournalReader& reader);
  uint32_t slot_of(const SegmentId& id);
  std::optional<PartId> part_of(const Record& record);
  /// Tells the contents which of the extents that are known already have keys that they watch.
  void mark_pinned();
  void count_evicted(const Record& condemnation, uint64_t bytes);

  Root& root_;
  SegmentTable& segments_;
  Catalog* catalog_;
  mutable std::mutex read_mutex_;  // journals_, own_journal_
  std::map<uint64_t, JournalReader> journals_;
  std::atomic<uint64_t> own_journal_ = 0;
  std::mutex apply_mutex_;  // the five below
  std::optional<uint32_t> last_slot_;
  SegmentId last_segment_;
  std::optional<PartId> last_part_;
  PartShape last_shape_;
  std::set<std::pair<uint32_t, uint64_t>> bad_places_;  // (slot, offset): condemned extents, bounded
  std::atomic<uint64_t> records_ = 0;
  std::atomic<uint64_t> bad_records_ = 0;
  std::atomic<bool> condemned_ = false;
  std::atomic<bool> counts_evictions_ = false;
  std::array<std::atomic<uint64_t>, kCauseNames.size()> evicted_{};
  SegmentContents contents_;
  RootPolicies policies_;
  std::mutex tend_mutex_;
  uint64_t tend_again_ns_ = 0;
};

}  // namespace tokendepot
