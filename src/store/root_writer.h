// The writing half of a root: this process's journal, the segment it fills, and the space for the next ones.
//
// Order that everything rests on: bytes first, then the journal record. Failure of either is a store that did
// not happen. Capacity: the segment files of a root, spares and condemned ones included, never exceed its
// capacity, and the file system's free space never falls under the reserve by the depot's doing; when no
// space can be had, stores are dropped.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>

#include "base/clock.h"
#include "store/condemned_files.h"
#include "store/journal_file.h"
#include "store/replay.h"
#include "store/root.h"
#include "store/scan.h"
#include "store/segment_inventory.h"

namespace tokendepot {

/// Asked for a segment before it is evicted: saves what is to be saved of it. `busy`: it stays for now,
/// another one may go; `closed`: none may. May be empty.
using BeforeEviction = std::function<Status(uint32_t slot)>;

class RootWriter {
 public:
  /// How long a confirmation of the journal's lock counts. Shorter than any network file system needs to
  /// notice that a client has gone and to free what it held.
  static constexpr uint64_t kHoldNs = 4ull * 1000 * 1000 * 1000;

  /// Takes over the journal (and half-filled segment) of a dead writer, or starts a new one. `replay.first()`
  /// has been called. `eviction_grace_ns`: how long a condemned segment's file stays, see CondemnedFiles.
  static Result<std::unique_ptr<RootWriter>> open(Root& root, Replay& replay, SegmentTable& segments,
                                                  const Clock& clock, uint64_t free_space_reserve,
                                                  uint64_t eviction_grace_ns = 0);
  ~RootWriter();

  struct Place {
    uint32_t slot = 0;
    ExtentRef where;
    SegmentLease segment;
    uint32_t hold = 0;  // see confirm_hold()
  };
  /// Space for one extent, never waiting: `busy` while the next segment is being prepared, `no_space` when
  /// none can be had. Thread-safe, as are the calls below.
  Result<Place> reserve(uint64_t bytes);

  /// Space in the segment that is being filled and in no other: what the keeper carries on never takes the
  /// space that stores wait for. `busy` when it is full.
  Result<Place> reserve_beside(uint64_t bytes);
  /// Space in the segment of copies. May wait, and evict: the keeper's slow thread only.
  Result<Place> reserve_copy(uint64_t bytes, const BeforeEviction& before_eviction);

  /// Makes a written extent known: the store is acknowledged when this returns success. `put.time_ns`: when
  /// it was stored first, 0 = now. `closed`: another process has taken the place over since it was reserved.
  Status acknowledge(const Place& place, Record put);
  /// Tells everybody that an extent is not to be served any more, by default because it is bad.
  void condemn_extent(Record record, Cause cause = Cause::corrupt);
  /// The two halves of it, for threads that must not wait for the root's file system: this process forgets
  /// the extent at once; the record that comes back is for tell_condemned(), which writes the journal.
  Record condemn_here(Record record, Cause cause = Cause::corrupt);
  void tell_condemned(Record record);
  /// Tells everybody that a segment was used.
  void touch(uint32_t slot);

  // --- the keeper's threads only ---
  /// Has the next segment ready: creates one within the capacity, or recycles the coldest. `before_eviction`,
  /// when given, is asked to save a segment before it goes (demotion).
  Status prepare_spare(const BeforeEviction& before_eviction);
  bool wants_spare() const;
  /// No next segment for now: stores that want one are to be dropped, not to wait.
  void refuse_more() { no_space_ = true; }
  /// Leaves the segments that are to be filled when somebody took their files away or cut them short: what
  /// went there would be lost.
  void leave_spoilt_segments();
  /// Takes the journal's lock once more, which a network file system frees when a connection breaks. Where
  /// another process has the journal by now, goes on with a new journal and new segments. To be called once a
  /// second; on a network file system nothing is appended when the last success is kHoldNs ago.
  void confirm_hold();
  /// Seals what dead writers left half-filled and makes their unjournaled extents known. Returns journals
  /// tended.
  uint32_t tend_dead_writers();
  /// Removes segment files that no journal speaks of and no live writer owns.
  void remove_orphans();
  /// Removes small files (marker, manifests, notes) that a dead process had begun and not renamed. To be
  /// called every few seconds: the first call finds them, the second removes what is still there, later ones
  /// do nothing.
  void remove_unfinished();
  /// Removes what has outlived its time, and of namespaces over their quota their own coldest. Returns how
  /// many segments. What is filled, used by this process or pinned stays.
  uint32_t reclaim();
  /// Rewrites the journal without what is gone, when it is large and mostly stale.
  void compact_journal();
  /// A file for a copy of another root's sealed segment: created or recycled, locked name, right size.
  /// `busy`: another process copies it, or has copied it.
  Result<File> open_copy(const SegmentId& id, uint64_t bytes, const BeforeEviction& before_eviction);
  /// Publishes the finished copy under its name and journals its content. `busy`: another process was first.
  Status publish_copy(const SegmentId& id, const File& copy, uint64_t used_bytes);
  /// Removes a copy that was not published.
  void drop_copy(const SegmentId& id, const File& copy);
  /// Publishes a copy that is still empty under its name. Who holds its lock may extend it.
  Status begin_copy(const SegmentId& id, const File& copy);
  /// One extent was written into a copy: journals it.
  Status extend_copy(Record put);
  /// Seals a copy of a segment of `used_bytes`, and before that adds to it what `source`, the segment, holds
  /// beyond it; null = nothing. `busy`: somebody else extends it, or the keeper's lock is another process's.
  Status complete_copy(const SegmentId& id, const File* source, uint64_t used_bytes);

  /// Given out by reserve() since it was opened.
  uint64_t stored_bytes() const { return stored_bytes_; }
  uint64_t evicted_segments() const { return evicted_; }
  /// Of copies and journal records; stores are counted where they happen.
  uint64_t written_bytes() const { return written_bytes_; }
  /// The last attempt to have space ready failed; it is repeated in the background.
  bool failing() const { return failing_; }
  /// It failed because everything that could be evicted is pinned.
  bool space_is_pinned() const { return no_space_ && pinned_; }
  uint64_t writer_id() const { return writer_id_; }
  /// A segment that is ready and not begun: no journal speaks of it. No bytes: there is none.
  struct Spare {
    SegmentId id;
    uint64_t bytes = 0;
  };
  /// Like all of these it never waits for a journal to be written: it may be a moment old.
  Spare spare() const;
  /// Of condemned segments whose files are still there.
  uint64_t leaving_bytes() const { return condemned_files_.bytes(); }
  std::map<SegmentId, uint64_t> leaving_files() const { return condemned_files_.files(); }
  Root& root() { return root_; }
  const std::string& root_path() const { return root_.path(); }

 private:
  struct Current {
    uint32_t slot = 0;
    SegmentId id;
    SegmentLease segment;
    uint64_t used = 0;
    uint64_t bytes = 0;
  };
  RootWriter(Root& root, Replay& replay, SegmentTable& segments, const Clock& clock, uint64_t reserve,
             uint64_t eviction_grace_ns);
  Status adopt_or_create();
  void use_journal(JournalWriter journal);
  /// Scans what lies behind the last journaled extent of a segment and journals it. Returns the end.
  Result<uint64_t> recover_tail(JournalWriter& journal, const SegmentId& id, uint64_t used,
                                ScanBudget& budget);
  Status start_segment(const SegmentId& id, File file, uint64_t used, bool journaled);
  Record seal_of(const Current& segment) const;
  /// A segment file of this id that nothing speaks of yet, open and mapped.
  Result<SegmentLease> make_segment(const SegmentId& id, uint64_t bytes,
                                    const BeforeEviction& before_eviction);
  /// `busy`, and the file removed, when the journal got another id since this one was given.
  Status still_ours_locked(const SegmentId& id);
  SegmentId next_id_locked();
  /// Cuts `bytes` off a segment that has room for them.
  Place cut_locked(Current& segment, uint64_t bytes);
  /// The journal and the segments that are being filled are another process's now.
  Status start_anew_locked();
  bool holds_journal_locked() const;
  /// Whether nobody has held a writer's journal for so long that it counts as dead.
  bool is_abandoned(uint64_t writer);
  /// Gives a copy its name, and journals what is known of it.
  /// `busy`: a copy of this segment has been published here. The keeper's lock is held. Its source may have
  /// been evicted for that since, and its file recycled: whoever copies it still must not replace the good
  /// copy.
  Status is_not_there(const SegmentId& id);
  Status name_copy(const SegmentId& id, const File& copy, std::span<Record> records);
  /// Writes those extents of `source` into `copy` that it lacks. `puts` receives the records of all.
  Status add_missing(const File& copy, const File& source, const SegmentId& id, std::vector<Record>& puts);
  Status append(Record record);
  Status append_locked(std::span<Record> records);
  /// The keeper's lock, or `busy`.
  Result<KeeperLock> lock_keeper();
  /// A file of `bytes`: new within the capacity, else that of a condemned segment whose grace is over. `busy`
  /// until there is one. The caller holds the keeper's lock.
  /// `kept`, when given, receives this process's mapping of a recycled file: its pages need no faults again.
  Result<File> make_file(KeeperLock& keeper, const SegmentFileName& name, uint64_t bytes,
                         const BeforeEviction& before_eviction, SegmentMapping* kept = nullptr);
  /// Removes the file of a segment that nothing speaks of, without the keeper's lock.
  Status remove_unused(const SegmentId& id);
  void drop_spare(const SegmentId& id);
  void leave_removed(const SegmentId& id);
  /// Seals it, so that reserve() goes on with the next one.
  void leave_cut(const SegmentId& id);
  /// Condemns a segment, whose file goes after the grace. The caller holds the keeper's lock. False: it
  /// stays.
  Result<bool> remove_segment(KeeperLock& keeper, uint32_t slot, Cause cause);
  /// Condemns the namespace's extents in a segment that others share, up to `wanted` bytes. Returns how many
  /// bytes.
  uint64_t condemn_share(uint32_t slot, uint64_t ns_prefix, uint64_t wanted);
  /// `busy` when another process has taken over as keeper: whoever was stopped for long goes no further.
  Status still_keeper(const KeeperLock& keeper) const;
  /// Condemns the coldest segment. Its file stays for the grace.
  Status evict_coldest(KeeperLock& keeper, const BeforeEviction& before_eviction);
  /// As much as is to be condemned at a time, so that a file is past its grace when the next segment is
  /// wanted.
  uint64_t bytes_to_condemn(uint64_t wanted) const;
  /// Condemns what the next segments will need. `used`: bytes of all files, the newest included.
  void condemn_ahead(KeeperLock& keeper, uint64_t used, uint64_t bytes,
                     const BeforeEviction& before_eviction);
  std::optional<CondemnedFiles::Leaving> take_condemned(uint64_t wanted_bytes, bool at_once);

  Root& root_;
  Replay& replay_;
  SegmentTable& segments_;
  const Clock& clock_;
  const uint64_t free_space_reserve_;
  SegmentInventory inventory_;
  CondemnedFiles condemned_files_;

  mutable std::mutex mutex_;  // everything below
  JournalWriter journal_;
  uint32_t next_sequence_ = 0;
  uint32_t hold_ = 0;          // journals lost so far
  uint64_t confirmed_ns_ = 0;  // steady clock; 0 = still taking over what was found
  std::optional<Current> current_;
  std::optional<Current> spare_;
  std::optional<Current> copies_;            // filled by reserve_copy()
  std::map<uint64_t, uint64_t> free_since_;  // writer -> steady clock; the slow keeper's only
  std::optional<std::set<std::string>>
      unfinished_;  // found by the first remove_unfinished(); the slow keeper's only
  std::atomic<uint64_t> writer_id_ = 0;
  mutable std::mutex known_mutex_;  // held for a moment, after mutex_
  mutable Spare known_spare_;
  std::atomic<uint64_t> stored_bytes_ = 0;
  std::atomic<uint64_t> evicted_ = 0;
  std::atomic<uint64_t> written_bytes_ = 0;
  std::atomic<bool> failing_ = false;
  std::atomic<bool> no_space_ = false;
  std::atomic<bool> pinned_ = false;   // the last search for something to evict passed over pinned segments
  std::atomic<bool> cramped_ = false;  // the file system has no room for a journal record
};

}  // namespace tokendepot
