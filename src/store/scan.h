// Reads the extents that lie in a segment file from their headers, for recovery and for copies between roots.
#pragma once

#include <functional>

#include "format/extent.h"
#include "format/journal.h"
#include "io/file.h"
#include "tokendepot/error.h"

namespace tokendepot {

inline constexpr uint64_t kScanPatience = 64ull << 20;

/// Where `file` ends as far as anybody need look: at its size, but no further than 1 GiB and four times what
/// it occupies on the medium. A hole costs nothing to make and as much to read as bytes do. Segments without
/// holes, and all of up to 1 GiB, are credible to their end. Errors: io.
Result<uint64_t> credible_bytes(const File& file);

/// What scans may still read, in bytes: four times what each of the files occupies, and this much for all of
/// them together. One budget for the segments of one writer, who leaves few open.
struct ScanBudget {
  uint64_t bytes = 1ull << 30;
};

/// Visits, in order, every extent from `from` on whose header decodes, names `id` and its own offset, and
/// fits credible_bytes(). `verify` also reads and checks the payload; then a torn extent is passed over.
/// Gives up after `patience` bytes without an extent: behind 64 MiB nothing was ever acknowledged, unless a
/// header in between was damaged since; and when `budget`, by default one of its own, is used up, which it
/// logs: honest extents do not overlap, so that reading all of them costs less. Needs 2 MiB of memory,
/// whatever the headers say. Returns the end of the last extent (or `from`).
Result<uint64_t> scan_extents(const File& file, const SegmentId& id, uint64_t from, bool verify,
                              const std::function<void(const ExtentHeader&, uint64_t bytes)>& visit,
                              uint64_t patience = kScanPatience, ScanBudget* budget = nullptr);

/// The record that makes an extent known, from the extent itself: scan_extents() has checked where it lies.
Record put_of(const ExtentHeader& header, uint64_t bytes);

}  // namespace tokendepot
