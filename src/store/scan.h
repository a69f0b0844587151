// Reads the extents that lie in a segment file from their headers, for recovery and for copies between roots.
#pragma once

#include <functional>

#include "format/extent.h"
#include "format/journal.h"
#include "io/file.h"
#include "tokendepot/error.h"

namespace tokendepot {

inline constexpr uint64_t kScanPatience = 64ull << 20;

/// Visits, in order, every extent from `from` on whose header decodes, names `id` and its own offset, and
/// fits the file. `verify` also reads and checks the payload; then a torn extent is passed over. Gives up
/// after `patience` bytes without an extent: behind 64 MiB nothing was ever acknowledged, unless a header in
/// between was damaged since. Returns the end of the last extent (or `from`).
Result<uint64_t> scan_extents(const File& file, const SegmentId& id, uint64_t from, bool verify,
                              const std::function<void(const ExtentHeader&, uint64_t bytes)>& visit,
                              uint64_t patience = kScanPatience);

/// The record that makes an extent known, from the extent itself, whose place scan_extents() has checked.
Record put_of(const ExtentHeader& header, uint64_t bytes);

}  // namespace tokendepot
