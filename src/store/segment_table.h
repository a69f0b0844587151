// Every segment that the journals speak of, in all roots: where it is present, whether it is sealed, how warm
// it is.
//
// Slots are handed out once and never reused, so a catalog entry that names a slot cannot come to mean
// another segment. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <vector>

#include "tokendepot/plan.h"

namespace tokendepot {

using RootIndex = uint32_t;
inline constexpr RootIndex kMaxRoots = 8;

class SegmentTable {
 public:
  struct PerRoot {
    bool present = false;    // a file is there, as far as is known
    bool condemned = false;  // for ever: ids are not reused
    bool sealed = false;
    bool copies = false;  // holds nothing but what lower roots hold, too: not demoted
    uint64_t file_bytes = 0;
    uint64_t used_bytes = 0;   // end of the last extent known
    uint64_t extents = 0;      // puts seen
    uint64_t expired_end = 0;  // what lies before this offset has outlived its time here
    // Wall clock of the writer.
    uint64_t first_put_ns = 0;
    uint64_t last_put_ns = 0;
  };
  struct Segment {
    SegmentId id;
    PerRoot roots[kMaxRoots];
    uint64_t last_used_ns = 0;
    uint64_t last_touch_record_ns = 0;
    uint32_t in_use = 0;  // loads in flight in this process
  };

  /// The slot of a segment, made when it is new and `size()` is below `kMost`.
  uint32_t slot_of(const SegmentId& id);
  static constexpr size_t kMost = size_t{4096} * 16384;
  size_t size() const;
  std::optional<uint32_t> find(const SegmentId& id) const;
  SegmentId id_of(uint32_t slot) const;
  /// A sequence number that no segment of this writer has had, as far as is known: condemned ones count too.
  uint32_t next_sequence(uint64_t writer) const;

  void set_present(uint32_t slot, RootIndex root, uint64_t file_bytes);
  /// False: the segment is condemned there, the extent is gone with it.
  bool add_extent(uint32_t slot, RootIndex root, uint64_t end, uint64_t time_ns);
  void seal(uint32_t slot, RootIndex root, uint64_t used_bytes);
  void mark_copies(uint32_t slot, RootIndex root);
  void condemn(uint32_t slot, RootIndex root);
  bool condemned(uint32_t slot, RootIndex root) const;
  void touch(uint32_t slot, uint64_t time_ns);
  /// True once per `interval_ns`: the caller then writes a touch record.
  bool touch_due(uint32_t slot, uint64_t now_ns, uint64_t interval_ns);

  /// Bit r set = present and not condemned in root r.
  uint32_t present_in(uint32_t slot) const;
  bool alive(uint32_t slot) const { return present_in(slot) != 0; }
  /// Alive, and the extent at this 4 KiB page has not expired in every root that holds the segment.
  bool serves(uint32_t slot, uint32_t page) const;
  /// What lies before `end` is not served from this root any more; may also go back.
  void set_expired(uint32_t slot, RootIndex root, uint64_t end);

  void acquire(uint32_t slot);
  void release(uint32_t slot);
  /// Segments acquired now, each as often as it is: what this process has in motion.
  uint32_t in_motion() const { return in_motion_.load(std::memory_order_relaxed); }

  Segment get(uint32_t slot) const;
  /// Copies of all segments present in `root`, coldest first.
  std::vector<std::pair<uint32_t, Segment>> present_segments(RootIndex root) const;

 private:
  mutable std::shared_mutex mutex_;
  std::map<SegmentId, uint32_t> slots_;
  std::vector<Segment> segments_;
  std::atomic<uint32_t> in_motion_ = 0;
  // Read on every catalog probe without the lock; grown by whole blocks that never move.
  static constexpr uint32_t kBlock = 4096;
  static constexpr uint32_t kBlocks = kMost / kBlock;
  struct MaskBlock {
    std::array<std::atomic<uint8_t>, kBlock> present;
    std::array<std::atomic<uint32_t>, kBlock> expired;  // pages
  };
  std::array<std::atomic<MaskBlock*>, kBlocks> masks_{};
  std::vector<std::unique_ptr<MaskBlock>> mask_owner_;
  void publish_mask(uint32_t slot);
};

/// Keeps this process from evicting a segment for as long as it lives.
class SegmentInUse {
 public:
  SegmentInUse(SegmentTable& segments, uint32_t slot) : segments_(segments), slot_(slot) {
    segments_.acquire(slot_);
  }
  ~SegmentInUse() { segments_.release(slot_); }
  SegmentInUse(const SegmentInUse&) = delete;
  SegmentInUse& operator=(const SegmentInUse&) = delete;

 private:
  SegmentTable& segments_;
  const uint32_t slot_;
};

}  // namespace tokendepot
