#include "io/stream.h"

#include <unistd.h>

#include <cerrno>

#include "base/errors.h"

namespace tokendepot {

Result<size_t> read_stream(int fd, std::span<std::byte> out) {
  size_t filled = 0;
  while (filled < out.size()) {
    const ssize_t count = ::read(fd, out.data() + filled, out.size() - filled);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return fail_errno(errno, "cannot read the stream");
    if (count == 0) break;
    filled += static_cast<size_t>(count);
  }
  return filled;
}

Status write_stream(int fd, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(fd, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EPIPE) return fail(ErrorKind::closed, "the reader of the stream has gone");
    if (count < 0) return fail_errno(errno, "cannot write the stream");
    bytes = bytes.subspan(static_cast<size_t>(count));
  }
  return {};
}

}  // namespace tokendepot
