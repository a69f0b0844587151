// Carries on what is used of a segment that is about to go, within a budget.
#pragma once

#include <atomic>
#include <cstdint>

#include "base/clock.h"
#include "store/promotion.h"

namespace tokendepot {

/// Extents that were loaded since they were stored go into the segment that is being filled, hottest first,
/// verified like a load. Never more than `percent` of the bytes stored by this process, journal records and
/// copies of demoted segments counted, so the write amplification is at most 1 + percent / 100.
class Rewriting {
 public:
  Rewriting(uint32_t percent, const ExtentUse& use, SegmentTable& segments, const Clock& clock)
      : percent_(percent), use_(use), segments_(segments), clock_(clock) {}

  /// Does nothing for a segment that another root holds, too, or that consists of copies. The keeper's
  /// threads only.
  void carry_on(const Promotion::Tier& from, uint32_t slot, RootWriter& target,
                const std::atomic<bool>& stop);

  uint64_t extents() const { return extents_; }
  uint64_t bytes() const { return bytes_; }

 private:
  uint64_t budget(const RootWriter& target) const;

  const uint32_t percent_;
  const ExtentUse& use_;
  SegmentTable& segments_;
  const Clock& clock_;
  std::atomic<uint64_t> extents_ = 0;
  std::atomic<uint64_t> bytes_ = 0;
};

}  // namespace tokendepot
