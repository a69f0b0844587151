// Reads an extent back and holds it against what the journals say of it: for verify and scrub.
#pragma once

#include <functional>
#include <string>

#include "io/file.h"
#include "tokendepot/error.h"
#include "tokendepot/tools.h"

namespace tokendepot {

/// Checks header and every shard of one extent in `file`, in pieces of 1 MiB at most. `where` begins the
/// messages. `may_read`, when given, is asked before each piece, told its bytes, and may wait; false ends the
/// check with `closed`. Errors: corrupt, unsupported (header of another version), io. Never reads past the
/// file's end. Works on files opened with O_DIRECT.
Status check_extent(const File& file, const StoredExtent& extent, const std::string& where,
                    const std::function<bool(uint64_t bytes)>& may_read = nullptr);

}  // namespace tokendepot
