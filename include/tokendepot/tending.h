// What an operator asks of a root (time to live, quotas, pins) and what its keeper notes there about itself.
//
// Both lie in the root as small files, so that every process on every host that uses it obeys and knows the
// same. docs/format.md, "Policies" and "Keeper's notes".
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "tokendepot/key.h"
#include "tokendepot/plan.h"

namespace tokendepot {

/// One rule. Plain data.
struct Policy {
  enum class Kind : uint8_t {
    ttl = 1,    // extents stored longer ago than `value` ns are not served
    quota = 2,  // live extents of the namespace take at most `value` bytes
    pin = 3,    // extents are not evicted for space before `value` (wall clock in ns since 1970; 0 = never)
  };
  Kind kind = Kind::pin;
  NamespaceDigest ns;     // all zero: the root as a whole, for a ttl only
  uint64_t value = 0;     // more than 0 but for a pin
  uint64_t made_ns = 0;   // wall clock, information only
  std::vector<Key> keys;  // of a pin: these chunks only; empty = the whole namespace
  bool operator==(const Policy&) const = default;
};

/// All rules of a root. There is at most one ttl and one quota of a namespace.
struct Policies {
  uint64_t revision = 0;  // grows with every change; 0 = there is no file
  std::vector<Policy> rules;
  bool operator==(const Policies&) const = default;
};

/// Share of a root's capacity that pins may hold at most: 1 / kPinShare.
inline constexpr uint64_t kPinShare = 2;

/// What the keeper that scrubs a root notes there. Lost, it costs a scrub that starts over.
struct KeeperNotes {
  uint64_t capacity_bytes = 0;  // that the process which wrote this was given
  SegmentId scrub_next;         // the pass goes on with this segment
  uint64_t scrub_began_ns = 0;  // wall clock; 0 = no pass is under way
  uint64_t scrub_bytes = 0;     // read in this pass
  uint64_t scrub_bad = 0;       // extents that were condemned in this pass
  uint64_t finished_ns = 0;     // wall clock, end of the last full pass; 0 = there was none
  uint64_t finished_bytes = 0;  // read in that pass
  uint64_t finished_bad = 0;    // condemned in that pass
  bool operator==(const KeeperNotes&) const = default;
};

/// Why something is not served any more. On the medium; order and numbers are stable.
enum class Cause : uint8_t { untold = 0, capacity = 1, quota = 2, ttl = 3, manual = 4, corrupt = 5 };
inline constexpr std::array<const char*, 6> kCauseNames{"untold", "capacity", "quota",
                                                        "ttl",    "manual",   "corrupt"};

}  // namespace tokendepot
