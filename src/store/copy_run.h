// Copies a run of one segment file to the same place of another.
#pragma once

#include <cstdint>
#include <functional>

#include "io/file.h"
#include "tokendepot/error.h"

namespace tokendepot {

/// Copies [offset, offset + bytes), whole pages, piece by piece in 4 MiB of memory at most; works on files
/// opened with O_DIRECT. Before each piece `go_on`, when given, is asked; where it says no: `closed`. After
/// any error the target holds a part of the run.
Status copy_run(const File& source, const File& target, uint64_t offset, uint64_t bytes,
                const std::function<bool()>& go_on = nullptr);

}  // namespace tokendepot
