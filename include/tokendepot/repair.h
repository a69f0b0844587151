// What a root has lost of its own account of itself, found again in what lies on the medium.
//
// Safe while engines run: a segment that a living writer fills is left alone, journals of living writers are
// not touched, and changes are made under the keeper's lock. Idempotent, and complete again after a kill in
// its middle.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tokendepot/error.h"

namespace tokendepot {

struct RepairReport {
  enum class Marker : uint8_t { sound, missing, damaged };
  Marker marker = Marker::sound;
  struct Journal {
    std::string file;
    uint64_t good_records = 0;
    uint64_t bad_records = 0;  // and a torn end counts as one
  };
  std::vector<Journal> journals;  // damaged ones of dead writers: written anew without what cannot be read
  struct Segment {
    std::string file;
    uint64_t extents = 0;  // sound, and in no journal
    uint64_t bytes = 0;
  };
  std::vector<Segment> segments;
  std::vector<std::string> manifests;  // digests, whose text was found again
  std::vector<std::string> lost_manifests;
  uint64_t damaged_extents = 0;  // in no journal and with wrong digests: stay out
  struct Left {
    std::string file;
    std::string why;
  };
  std::vector<Left> left;  // what is not the depot's, or not to be touched now

  bool nothing_to_do() const {
    return marker == Marker::sound && journals.empty() && segments.empty() && manifests.empty();
  }
};

/// Looks through all segments of a root (headers; the payload of what no journal speaks of) and says what is
/// to be done, or with `apply` does it. `sources` are other roots in which lost manifests may be found.
/// Nothing is removed but the damaged journals that were written anew. What a lost record had condemned comes
/// back: it is whole. Errors: not_found (nothing of a depot here), unsupported (another format version:
/// nothing is touched), permission, busy, io.
Result<RepairReport> repair_root(const std::string& path, const std::vector<std::string>& sources, bool apply,
                                 const std::function<void(uint64_t done, uint64_t total)>& progress);

}  // namespace tokendepot
