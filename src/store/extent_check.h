// Holds an extent against what the journals and its own digests say of it: for verify, scrub, export, import.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "format/extent.h"
#include "format/journal.h"
#include "io/file.h"
#include "tokendepot/error.h"
#include "tokendepot/tools.h"

namespace tokendepot {

/// What a put speaks of.
StoredExtent extent_of(const Record& put);
/// A record about this extent, as a condemnation names it: type, cause and time are the caller's.
Record record_of(const StoredExtent& extent);
/// Drops, from extents in the order of their places, those that overlap another one, all but the one that
/// ends first: at most one of them is honest, and together they claim more bytes to be read than their file
/// has.
void drop_overlapping(std::vector<StoredExtent>& extents);
/// Whether the header found at `where` is the one that the journal speaks of. `corrupt` if not.
Status check_header(const ExtentHeader& header, const StoredExtent& extent, const std::string& where);
/// Whether the payload behind the header at the front of `extent`, all of it in memory, is what its digests
/// say. `corrupt` if not.
Status check_payload(const ExtentHeader& header, std::span<const std::byte> extent, const std::string& where);

/// Checks header and every shard of one extent in `file`, of which `file_bytes` can be believed
/// (credible_bytes()), in pieces of 1 MiB at most, and with no more memory than that.
/// `where` begins the messages. `may_read`, when given, is asked before each piece, told its bytes, and may
/// wait; false ends the check with `closed`. Errors: corrupt, unsupported (header of another version), io.
/// Never reads past that end. Works on files opened with O_DIRECT.
Status check_extent(const File& file, uint64_t file_bytes, const StoredExtent& extent,
                    const std::string& where, const std::function<bool(uint64_t bytes)>& may_read = nullptr);

}  // namespace tokendepot
