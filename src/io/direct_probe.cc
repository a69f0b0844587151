#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/errors.h"
#include "io/aligned_memory.h"
#include "io/file.h"
#include "io/file_size_signal.h"
#include "io/scratch_file.h"

namespace tokendepot {
namespace {

constexpr uint32_t kSmallest = 512;
constexpr uint32_t kLargest = 64 << 10;
constexpr uint32_t kPage = 4 << 10;

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
  constexpr uint64_t kEach = 4 * kLargest;
  const auto memory = aligned_memory(2 * kLargest, 2 * kEach, "a probe of direct I/O");
  if (!memory) return std::unexpected(memory.error());
  std::byte* const out = memory->get();
  std::byte* const in = out + kEach;
  for (uint32_t alignment = kSmallest; alignment <= kLargest; alignment *= 2) {
    const int error = try_alignment(file->fd(), alignment, out + alignment, in + alignment);
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
  const auto memory = aligned_memory(kPage, 2 * kPage, "a probe of direct I/O");
  if (!memory) return std::unexpected(memory.error());
  if (::pread(file->fd(), memory->get() + kPage, kPage, kPage) >= 0 || errno != EINVAL) return {};
  return fail(ErrorKind::unsupported, "direct I/O of {} refuses transfers of {} bytes", path, kPage);
}

}  // namespace tokendepot
