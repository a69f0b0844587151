#include "io/scratch_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/random.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <utility>

#include "base/check.h"
#include "base/errors.h"

namespace tokendepot {
namespace {

int open_retrying(const std::string& path, int flags) {
  int fd;
  do {
    fd = ::open(path.c_str(), flags, 0600);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

}  // namespace

std::string temporary_path(const std::string& directory) {
  uint64_t random = 0;
  ssize_t got;
  do {
    got = ::getrandom(&random, sizeof(random), 0);
  } while (got < 0 && errno == EINTR);
  TD_CHECK(got == sizeof(random));
  return fmt::format("{}/.tmp-{:016x}", directory, random);
}

ScratchFile::ScratchFile(ScratchFile&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

ScratchFile::~ScratchFile() {
  if (fd_ >= 0) ::close(fd_);
}

Result<ScratchFile> ScratchFile::create(const std::string& directory, bool direct) {
  const int flags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | (direct ? O_DIRECT : 0);
  int fd = open_retrying(directory, flags | O_TMPFILE);
  if (fd >= 0) return ScratchFile(fd);

  // EINVAL is ambiguous here (no O_TMPFILE, or no O_DIRECT), and old kernels answer EISDIR or ENOENT for
  // O_TMPFILE.
  const std::string path = temporary_path(directory);
  fd = open_retrying(path, flags | O_CREAT | O_EXCL);
  const int error = errno;
  if (fd >= 0 || error == EINVAL) ::unlink(path.c_str());
  if (fd >= 0) return ScratchFile(fd);
  return fail_errno(error, "cannot create a temporary file{} in {}", direct ? " for direct I/O" : "",
                    directory);
}

}  // namespace tokendepot
