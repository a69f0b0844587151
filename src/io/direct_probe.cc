#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "base/check.h"
#include "base/errors.h"
#include "io/file.h"
#include "io/file_size_signal.h"
#include "io/scratch_file.h"

namespace tokendepot {
namespace {

constexpr uint32_t kSmallest = 512;
constexpr uint32_t kLargest = 64 << 10;
constexpr uint32_t kPage = 4 << 10;

struct Release {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using AlignedBytes = std::unique_ptr<std::byte, Release>;

AlignedBytes allocate(size_t bytes) {
  AlignedBytes memory(static_cast<std::byte*>(std::aligned_alloc(2 * kLargest, bytes)));
  TD_CHECK(memory != nullptr);
  return memory;
}

// Zero when one transfer works whose offset, length and address are odd multiples of `alignment`.
int try_alignment(int fd, uint32_t alignment, std::byte* out, std::byte* in) {
  std::memset(out, 0x5a, alignment);
  std::memset(in, 0, alignment);
  ssize_t moved;
  do {
    moved = ::pwrite(fd, out, alignment, alignment);
  } while (moved < 0 && errno == EINTR);
  if (moved < 0) return errno;
  if (moved != static_cast<ssize_t>(alignment)) return EIO;
  do {
    moved = ::pread(fd, in, alignment, alignment);
  } while (moved < 0 && errno == EINTR);
  if (moved < 0) return errno;
  return moved == static_cast<ssize_t>(alignment) && std::memcmp(in, out, alignment) == 0 ? 0 : EIO;
}

}  // namespace

Result<uint32_t> probe_direct_alignment(const std::string& directory) {
  const Result<ScratchFile> file = ScratchFile::create(directory, true);
  if (!file) return std::unexpected(file.error());
  const FileSizeSignalGuard no_signal;
  const AlignedBytes out = allocate(4 * kLargest);
  const AlignedBytes in = allocate(4 * kLargest);
  for (uint32_t alignment = kSmallest; alignment <= kLargest; alignment *= 2) {
    const int error = try_alignment(file->fd(), alignment, out.get() + alignment, in.get() + alignment);
    if (error == 0) return alignment;
    // EINVAL is how every file system says "not aligned enough"; anything else is a real failure.
    if (error != EINVAL) return fail_errno(error, "cannot probe direct I/O in {}", directory);
  }
  return fail(ErrorKind::unsupported, "direct I/O in {} refuses transfers of {} to {} bytes", directory,
              kSmallest, kLargest);
}

Status probe_direct_reads(const std::string& path) {
  const Result<File> file = File::open(path, {.direct = true});
  if (!file) return std::unexpected(file.error());
  const AlignedBytes memory = allocate(2 * kLargest);
  if (::pread(file->fd(), memory.get() + kPage, kPage, kPage) >= 0 || errno != EINVAL) return {};
  return fail(ErrorKind::unsupported, "direct I/O of {} refuses transfers of {} bytes", path, kPage);
}

}  // namespace tokendepot
