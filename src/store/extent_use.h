// When extents were loaded last: 8 bytes for each, forgetful.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace tokendepot {

/// A table of fixed size in which a newcomer takes the place of what was there: heat is a hint, and whoever
/// is forgotten counts as cold. Lock-free; times are wall clock in ns, kept to about 1 ms and for 51 days.
class ExtentUse {
 public:
  ExtentUse() : seats_(kSeats) {}

  /// Notes a use and returns the one before, 0 = none known.
  uint64_t exchange(uint32_t slot, uint64_t offset, uint64_t now_ns);
  /// The last use, 0 = none known.
  uint64_t last(uint32_t slot, uint64_t offset, uint64_t now_ns) const;

 private:
  static constexpr uint64_t kSeats = 1 << 18;  // 2 MiB of memory, touched as it is used
  std::vector<std::atomic<uint64_t>> seats_;   // high half: who; low half: when
};

}  // namespace tokendepot
