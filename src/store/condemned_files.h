// The segment files of one root that are condemned and still there, and when they may go.
//
// From its condemn record on a segment is missed by every lookup that has heard of it, within a second in
// every process. What was promised before that is to be loaded still: the file stays for a grace, counted by
// the clock of who removes it, from when this process condemned it or first found it condemned. So clocks
// need not agree, and a process that starts waits for the whole grace once more. It counts against the
// capacity until it goes. The grace only saves recomputing: whoever comes too late finds another epoch or no
// file, and misses.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>

#include "base/clock.h"
#include "store/segment_inventory.h"
#include "store/segment_mapping.h"
#include "store/segment_table.h"

namespace tokendepot {

/// Thread-safe.
class CondemnedFiles {
 public:
  CondemnedFiles(const Clock& clock, uint64_t grace_ns) : clock_(clock), grace_ns_(grace_ns) {}

  /// Takes note of which files are there now, and of all that others have condemned.
  void see(const SegmentInventory& files, const SegmentTable& segments, RootIndex root);
  /// This process has condemned it just now. `mapping`, which may be empty, is kept for the file's next life.
  void add(const SegmentId& id, uint64_t bytes, SegmentMapping mapping);

  struct Leaving {
    SegmentId id;
    uint64_t bytes = 0;
    SegmentMapping mapping;
  };
  /// One that may go, out of the list: of `wanted_bytes` rather than another size, then the longest
  /// condemned. `at_once`: whether its grace is over or not. Those that `in_use` names stay.
  std::optional<Leaving> take(uint64_t wanted_bytes, bool at_once,
                              const std::function<bool(const SegmentId&)>& in_use);
  /// Whether this file is condemned and its grace is over.
  bool may_go(const SegmentId& id) const;
  bool contains(const SegmentId& id) const;

  uint64_t grace_ns() const { return grace_ns_; }
  /// Of the condemned files.
  uint64_t bytes() const;
  /// Each of them with its bytes.
  std::map<SegmentId, uint64_t> files() const;

 private:
  struct Condemned {
    uint64_t bytes = 0;
    uint64_t since_ns = 0;
    SegmentMapping mapping;
  };

  const Clock& clock_;
  const uint64_t grace_ns_;
  mutable std::mutex mutex_;
  std::map<SegmentId, Condemned> condemned_;
};

}  // namespace tokendepot
