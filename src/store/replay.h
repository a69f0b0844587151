// Tails all journals of one root into the segment table and, where there is one, the catalog.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <stop_token>
#include <vector>

#include "base/clock.h"
#include "store/catalog.h"
#include "store/index_bound.h"
#include "store/journal_file.h"
#include "store/root.h"
#include "store/root_policies.h"
#include "store/segment_contents.h"
#include "store/segment_table.h"
#include "tokendepot/stats.h"

namespace tokendepot {

/// Thread-safe: one mutex for reading journals, one for applying records.
class Replay {
 public:
  /// `catalog` may be null: then puts count for their segments only.
  Replay(Root& root, SegmentTable& segments, Catalog* catalog);

  /// Reads everything, then drops what the journals speak of but the directory does not hold.
  Status first();
  /// Ends first() and poll() early, from another thread, and for good: the depot closes.
  void stop() { stop_.request_stop(); }
  /// Reads what was appended since. False: some journal could not be read to its end now; the next poll tries
  /// again, and until then nobody may conclude that no journal speaks of something.
  bool poll();

  /// Applies a record that this process wrote itself (its own journal is not tailed).
  void apply(const Record& record) { apply(std::span(&record, 1)); }
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
  /// Whether the extent at this place was condemned: nobody may carry it on.
  bool is_condemned(uint32_t slot, uint64_t offset) const;
  /// Bytes of extents that were condemned since first(): by this process, and by hand from outside.
  EvictedBytes evicted() const;

  uint64_t records() const { return records_; }
  uint64_t bad_records() const { return bad_records_; }
  /// From the time of each put that another process wrote to the poll that found it. What was there at the
  /// journal's first reading is not counted.
  LatencyCounts lag() const;
  /// A segment was condemned since the last call: its catalog entries want sweeping.
  /// What was condemned counts against the bound of the index until then.
  bool take_condemned();

 private:
  /// One listing of the directory: opens what is new, forgets what has gone. Returns the sizes listed, which
  /// tell what has grown: on network file systems a listing is one request for many files, and newer than
  /// what open files say of themselves. nullopt: it cannot be listed now.
  std::optional<std::map<uint64_t, uint64_t>> find_journals();
  Status read(JournalReader& reader, uint64_t listed_bytes = 0);
  /// Descriptors of the journals that were read last are kept, of the others given back.
  void bound_open_journals();
  void apply(std::span<const Record> records);
  void apply_locked(const Record& record);
  void note_lag(const Record& record);
  /// Of its file, as the file system says now. nullopt: it is not there, or cannot be opened.
  std::optional<uint64_t> size_on_medium(const SegmentId& id) const;
  /// Returns the bytes of its live extents.
  uint64_t condemn_segment(uint32_t slot);
  /// Whether the extent can be there as far as the size of its file is known.
  bool fits(uint32_t slot, const Record& put);
  /// nullopt: a segment that is not there, after more such ones than an honest root has.
  std::optional<uint32_t> slot_of(const SegmentId& id);
  bool deserves_a_slot(const SegmentId& id) const;
  void note_displaced(const Record& record, uint32_t slot, PartId part);
  void put_back_displaced();
  std::optional<PartId> part_of(const Record& record);
  /// Tells the contents which of the extents that are known already have keys that they watch.
  void mark_pinned();
  void count_evicted(const Record& condemnation, uint64_t bytes);

  Root& root_;
  SegmentTable& segments_;
  Catalog* catalog_;
  std::stop_source stop_;
  mutable std::mutex read_mutex_;  // journals_, own_journal_
  std::map<uint64_t, JournalReader> journals_;
  std::deque<uint64_t> open_journals_;  // in the order of opening
  std::vector<Record> batch_;           // read and not applied yet
  std::atomic<uint64_t> own_journal_ = 0;
  mutable std::mutex apply_mutex_;  // all up to displaced_
  IndexBound bound_;
  std::map<SegmentId, uint64_t> listed_;  // segment files and their sizes, while first() is reading
  std::optional<uint32_t> last_slot_;
  SegmentId last_segment_;
  std::optional<PartId> last_part_;
  PartShape last_shape_;
  std::set<std::pair<uint32_t, uint64_t>> bad_places_;  // (slot, offset): condemned extents, bounded
  LatencyCounts lag_;
  struct Displaced {
    Key key;
    PartId part = 0;
    uint32_t slot = 0;
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };
  bool first_ = false;                // first() is reading
  std::vector<Displaced> displaced_;  // by a put of another copy of the same chunk, since first() began
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
