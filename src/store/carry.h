// Carries one extent to another place: read, verify, write, journal. For copies that the keeper makes.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

#include "format/journal.h"
#include "store/root_writer.h"

namespace tokendepot {

/// Copies the extent that `put` describes, as it lies in `source`, to `place` of `target` and acknowledges it
/// there. Piece by piece in 1 MiB of memory; the digests are made of the very bytes that are written, and
/// header and journal record, which make the copy known, come last. Before each piece `go_on` is asked, which
/// may take its time.
/// Errors: `not_found`, when the source does not hold that extent (any more); `corrupt`, when its bytes are
/// not what its header says; `closed`, when go_on said no; what reading, writing or the journal failed with.
/// After any of them the place holds no extent.
Status carry_extent(const File& source, const Record& put, RootWriter& target, const RootWriter::Place& place,
                    const std::function<bool()>& go_on);

}  // namespace tokendepot
