// What travels from the scheduler half to the worker half of an inference server: plain data plus a checked
// encoding.
//
// A plan is a promise about places, not about bytes: the worker checks identity and digest of everything it
// reads, so an old, foreign or damaged plan costs a miss at most.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "tokendepot/error.h"
#include "tokendepot/key.h"
#include "tokendepot/layout.h"

namespace tokendepot {

/// Names one segment for ever: a recycled segment file gets a new id, so an old plan cannot match its new
/// content.
struct SegmentId {
  uint64_t writer = 0;
  uint32_t sequence = 0;
  auto operator<=>(const SegmentId&) const = default;
};

/// Where one extent lies. Valid in every root that holds the segment: segments are copied between roots as
/// they are.
struct ExtentRef {
  SegmentId segment;
  uint64_t offset = 0;  // of the header, multiple of 4 KiB
  uint64_t bytes = 0;   // header and payload, multiple of 4 KiB
  bool operator==(const ExtentRef&) const = default;
};

/// Block id that stands for "not wanted": the engine already has the block, or does not need it (outside a
/// window).
inline constexpr int32_t kSkipBlock = -1;

struct LoadItem {
  Key key;
  uint32_t chunk = 0;  // index of the chunk in its prompt, handed back with failures
  uint16_t group = 0;
  LayoutKind kind = LayoutKind::canonical;
  Part part;            // what the extent holds
  uint32_t tokens = 0;  // tokens the extent holds
  ExtentRef where;
  std::vector<int32_t> blocks;  // one id per block of the chunk's last `tokens`, or kSkipBlock
};

struct LoadPlan {
  NamespaceDigest ns;
  uint64_t deadline_ns = 0;  // steady-clock nanoseconds from submission after which the rest fails; 0 = none
  std::vector<LoadItem> items;
};

struct StoreItem {
  Key key;
  uint32_t chunk = 0;
  uint16_t group = 0;
  std::vector<int32_t> blocks;  // one id per block of the chunk's last `tokens`; none may be kSkipBlock
};

struct StorePlan {
  NamespaceDigest ns;
  std::vector<StoreItem> items;
};

/// Encodings with magic, version, bounds and a trailing XXH3-64. Decoders accept any bytes without crashing
/// and allocate no more than a small multiple of the input; errors are `corrupt` or `unsupported` (other
/// version).
std::vector<std::byte> encode(const LoadPlan& plan);
std::vector<std::byte> encode(const StorePlan& plan);
Result<LoadPlan> decode_load_plan(std::span<const std::byte> bytes);
Result<StorePlan> decode_store_plan(std::span<const std::byte> bytes);

}  // namespace tokendepot
