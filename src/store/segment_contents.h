// What the segments of one root hold, by namespace and by age: what quotas, times to live and pins need to
// know.
//
// A few dozen bytes a segment while one namespace fills it, whatever its number of extents; what a second
// namespace puts into it costs a map entry an extent, and so do gaps between extents. Thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <vector>

#include "format/journal.h"

namespace tokendepot {

class SegmentContents {
 public:
  struct Tenant {
    uint64_t ns_prefix = 0;
    uint64_t bytes = 0;  // of live extents
  };
  /// Extents that end at or before `end` and behind the group before it. None was stored after `newest_ns`.
  struct AgeGroup {
    uint64_t end = 0;
    uint64_t newest_ns = 0;
  };
  struct Segment {
    std::vector<Tenant> tenants;  // the first one is whoever began it
    std::vector<AgeGroup> ages;   // by `end`; at most kMostAges
    uint64_t pinned_extents = 0;  // live extents whose key is watched
    uint64_t bytes() const {
      uint64_t total = 0;
      for (const Tenant& tenant : tenants) total += tenant.bytes;
      return total;
    }
  };
  static constexpr size_t kMostAges = 32;
  /// Namespaces in one segment; extents of more are not counted.
  static constexpr size_t kMostTenants = 256;

  /// Keeps at most so many map entries; extents that would need more are not counted.
  explicit SegmentContents(uint64_t most_places) : most_places_(most_places) {}

  /// Counts an extent, once however often it is told.
  void put(uint32_t slot, const Record& put);
  /// Takes back what put() counted for the extent at this place. Told once for each place.
  /// Returns the extent's bytes; 0 where none was known.
  uint64_t condemn_extent(uint32_t slot, const Record& condemnation);
  /// Forgets the segment. Returns the bytes of its live extents.
  uint64_t condemn_segment(uint32_t slot);

  /// From now on extents of these keys count as pinned; those that were put before are told by mark().
  void watch(std::set<Key> keys);
  void mark(uint32_t slot, const Record& put);

  /// Of all segments that hold anything.
  std::map<uint32_t, Segment> snapshot() const;

 private:
  struct Held : Segment {
    std::map<uint64_t, uint64_t> covered;    // begin -> end of what was put, merged
    std::map<uint64_t, uint64_t> of_others;  // offset -> namespace, where it is not the first tenant's
    std::set<uint64_t> pinned;               // offsets
  };
  static bool cover(Held& held, uint64_t begin, uint64_t end);
  static void note_age(Held& held, uint64_t end, uint64_t time_ns);

  const uint64_t most_places_;
  mutable std::mutex mutex_;
  uint64_t places_ = 0;  // entries of all `covered` and `of_others`
  std::map<uint32_t, Held> segments_;
  std::set<Key> watched_;
};

}  // namespace tokendepot
