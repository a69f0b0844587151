// Bytes in one direction through a descriptor that somebody lends: a file, a pipe, a socket.
#pragma once

#include <cstddef>
#include <span>

#include "tokendepot/error.h"

namespace tokendepot {

/// Reads until `out` is full or the stream ends; returns how many bytes came. Retries EINTR.
Result<size_t> read_stream(int fd, std::span<std::byte> out);
/// Writes everything. Retries EINTR; a reader that has gone is `closed`, without a signal's help where
/// SIGPIPE is ignored.
Status write_stream(int fd, std::span<const std::byte> bytes);

}  // namespace tokendepot
