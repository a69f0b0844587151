#include "io/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/check.h"
#include "base/errors.h"
#include "io/file_size_signal.h"

namespace tokendepot {
namespace {

// The kernel moves at most 0x7ffff000 bytes a call; a rounder bound keeps the rest of a transfer aligned.
constexpr size_t kMostPerCall = size_t{1} << 30;
constexpr size_t kZeroBytes = size_t{1} << 20;

std::unexpected<Error> not_regular(const std::string& path, const char* what) {
  return fail(ErrorKind::invalid_argument, "{} is {}, expected a regular file", path, what);
}

const char* describe(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a pipe";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

// Writes zeros over [from, to): what preallocation means where fallocate does not exist.
Status write_zeros(const File& file, uint64_t from, uint64_t to) {
  const std::vector<std::byte> zeros(std::min<uint64_t>(kZeroBytes, to - from));
  while (from < to) {
    const size_t bytes = std::min<uint64_t>(zeros.size(), to - from);
    if (Status status = file.write_at({zeros.data(), bytes}, from); !status) return status;
    from += bytes;
  }
  return {};
}

}  // namespace

File::File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)), path_(std::move(other.path_)) {}

File& File::operator=(File&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = std::exchange(other.fd_, -1);
    path_ = std::move(other.path_);
  }
  return *this;
}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

Result<File> File::open(const std::string& path, Flags flags) {
  TD_CHECK(flags.write || !flags.create);
  TD_CHECK(flags.create || !flags.exclusive);
  // O_NONBLOCK: opening a pipe or a device that somebody planted must not hang.
  int mode = (flags.write ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY;
  if (flags.create) mode |= O_CREAT;
  if (flags.exclusive) mode |= O_EXCL;
  if (flags.direct) mode |= O_DIRECT;

  int fd;
  do {
    fd = ::open(path.c_str(), mode, 0600);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) {
    const int error = errno;
    if (error == ELOOP) return not_regular(path, "a symbolic link (or too many of them lead to it)");
    if (error == EISDIR) return not_regular(path, "a directory");
    if (error == ENXIO) return not_regular(path, "a socket, a pipe or a device");
    if (error == EINVAL && flags.direct) {
      // The kernel has made the file before it finds that it cannot open it this way.
      if (flags.exclusive) ::unlink(path.c_str());
      return fail_errno(error, "cannot open {} for direct I/O, which its file system refuses", path);
    }
    return fail_errno(error, "cannot open {}", path);
  }

  File file;
  file.fd_ = fd;
  file.path_ = path;
  struct stat info;
  if (::fstat(fd, &info) != 0) return fail_errno(errno, "cannot stat {}", path);
  if (!S_ISREG(info.st_mode)) return not_regular(path, describe(info.st_mode));
  // On file systems without NOWAIT support io_uring would answer EAGAIN to every read of an O_NONBLOCK file.
  const int status_flags = ::fcntl(fd, F_GETFL);
  if (status_flags < 0 || ::fcntl(fd, F_SETFL, status_flags & ~O_NONBLOCK) != 0) {
    return fail_errno(errno, "cannot set the flags of {}", path);
  }
  return file;
}

bool File::is_direct() const {
  const int flags = ::fcntl(fd_, F_GETFL);
  return flags >= 0 && (flags & O_DIRECT) != 0;
}

Result<uint64_t> File::size() const {
  struct stat info;
  if (::fstat(fd_, &info) != 0) return fail_errno(errno, "cannot stat {}", path_);
  return static_cast<uint64_t>(info.st_size);
}

Result<uint64_t> File::allocated() const {
  struct stat info;
  if (::fstat(fd_, &info) != 0) return fail_errno(errno, "cannot stat {}", path_);
  return static_cast<uint64_t>(info.st_blocks) * 512;  // whatever st_blksize says
}

Status File::read_at(std::span<std::byte> out, uint64_t offset) const {
  while (!out.empty()) {
    const size_t wanted = std::min(out.size(), kMostPerCall);
    const ssize_t moved = ::pread(fd_, out.data(), wanted, static_cast<off_t>(offset));
    if (moved < 0) {
      if (errno == EINTR) continue;
      return fail_errno(errno, "cannot read {} bytes at {} of {}", wanted, offset, path_);
    }
    if (moved == 0) {
      return fail(ErrorKind::not_found, "{} ends at or before byte {}, expected {} more", path_, offset,
                  out.size());
    }
    out = out.subspan(static_cast<size_t>(moved));
    offset += static_cast<uint64_t>(moved);
  }
  return {};
}

Status File::write_at(std::span<const std::byte> bytes, uint64_t offset) const {
  const FileSizeSignalGuard no_signal;
  while (!bytes.empty()) {
    const size_t wanted = std::min(bytes.size(), kMostPerCall);
    const ssize_t moved = ::pwrite(fd_, bytes.data(), wanted, static_cast<off_t>(offset));
    if (moved < 0) {
      if (errno == EINTR) continue;
      return fail_errno(errno, "cannot write {} bytes at {} of {}", wanted, offset, path_);
    }
    if (moved == 0) {
      return fail(ErrorKind::io, "writing {} bytes at {} of {} moved none", wanted, offset, path_);
    }
    bytes = bytes.subspan(static_cast<size_t>(moved));
    offset += static_cast<uint64_t>(moved);
  }
  return {};
}

Status File::preallocate(uint64_t bytes) const {
  if (bytes == 0) return {};
  const FileSizeSignalGuard no_signal;
  const Result<uint64_t> before = size();
  if (!before) return std::unexpected(before.error());

  int error = 0;
  while (::fallocate(fd_, 0, 0, static_cast<off_t>(bytes)) != 0) {
    error = errno;
    if (error != EINTR) break;
    error = 0;
  }
  Status status;
  if (error == EOPNOTSUPP || error == EINVAL || error == ENOSYS) {
    if (bytes <= *before) return {};
    // Zeros go through the page cache, so that neither the old size nor `bytes` has to be aligned.
    const int flags = ::fcntl(fd_, F_GETFL);
    const bool direct = is_direct();
    if (direct) ::fcntl(fd_, F_SETFL, flags & ~O_DIRECT);
    status = write_zeros(*this, *before, bytes);
    // Some file systems learn only while flushing that there is no space.
    if (status) status = sync();
    if (direct && ::fcntl(fd_, F_SETFL, flags) != 0 && status) {
      status = fail_errno(errno, "cannot set {} back to direct I/O", path_);
    }
  } else if (error != 0) {
    status = fail_errno(error, "cannot allocate {} bytes for {}", bytes, path_);
  }
  if (!status) {
    const Result<uint64_t> after = size();
    if (after && *after > *before && ::ftruncate(fd_, static_cast<off_t>(*before)) != 0) {
      return fail_errno(errno, "{}; then cannot cut {} back to {} bytes", status.error().message, path_,
                        *before);
    }
  }
  return status;
}

Status File::truncate(uint64_t bytes) const {
  const FileSizeSignalGuard no_signal;
  while (::ftruncate(fd_, static_cast<off_t>(bytes)) != 0) {
    if (errno != EINTR) return fail_errno(errno, "cannot set the size of {} to {}", path_, bytes);
  }
  return {};
}

Status File::sync() const {
  while (::fdatasync(fd_) != 0) {
    if (errno != EINTR) return fail_errno(errno, "cannot flush {}", path_);
  }
  return {};
}

void File::drop_cached() const {
  // On a file system that has no page cache there is nothing to forget.
  (void)::posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED);
}

Result<File> File::duplicate() const {
  File copy;
  copy.fd_ = ::fcntl(fd_, F_DUPFD_CLOEXEC, 0);
  if (copy.fd_ < 0) return fail_errno(errno, "cannot duplicate the descriptor of {}", path_);
  copy.path_ = path_;
  return copy;
}

bool File::is_at_its_path() const {
  struct stat here;
  struct stat there;
  return ::fstat(fd_, &here) == 0 && ::lstat(path_.c_str(), &there) == 0 && here.st_dev == there.st_dev &&
         here.st_ino == there.st_ino;
}

bool File::was_removed() const {
  struct stat here;
  struct stat there;
  if (::fstat(fd_, &here) != 0) return false;
  if (::lstat(path_.c_str(), &there) != 0) return errno == ENOENT;
  return here.st_dev != there.st_dev || here.st_ino != there.st_ino;
}

Result<bool> File::try_lock_exclusive() const {
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  while (::fcntl(fd_, F_OFD_SETLK, &lock) != 0) {
    if (errno == EAGAIN || errno == EACCES) return false;
    if (errno != EINTR) return fail_errno(errno, "cannot lock {}", path_);
  }
  return true;
}

Result<bool> File::is_locked_by_another() const {
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  if (::fcntl(fd_, F_OFD_GETLK, &lock) != 0) return fail_errno(errno, "cannot ask for the lock of {}", path_);
  return lock.l_type != F_UNLCK;
}

}  // namespace tokendepot
