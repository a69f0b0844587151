// What the journals of a root remember of extents that are there no more.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "tokendepot/error.h"
#include "tokendepot/key.h"
#include "tokendepot/tools.h"

namespace tokendepot {

struct PastExtent {
  enum class Fate : uint8_t {
    live,       // as far as the journals know
    condemned,  // this extent was: removed, or found damaged
    evicted,    // its segment was
    vanished,   // its segment's file is not there, and no journal says why
  };
  StoredExtent extent;
  Fate fate = Fate::live;
  uint64_t ended_ns = 0;  // wall clock; 0 = not known
};

/// Every extent of these keys that a journal still speaks of. Journals forget what is gone when they are
/// compacted (above 4 MiB and half stale), so that an empty answer does not mean that nothing ever was.
/// Errors as list_extents().
Result<std::vector<PastExtent>> trace_extents(const std::string& path, std::span<const Key> keys);

}  // namespace tokendepot
