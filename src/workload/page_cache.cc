#include "workload/page_cache.h"

#include <fcntl.h>

#include "base/errors.h"
#include "io/file.h"

namespace tokendepot {

Status drop_cached_pages(const std::string& directory) {
  const auto entries = list_directory(directory);
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    if (!entry.regular) continue;
    const auto file = File::open(directory + "/" + entry.name, {});
    if (!file) {
      if (file.error().kind == ErrorKind::not_found) continue;  // recycled meanwhile
      return std::unexpected(file.error());
    }
    if (auto synced = file->sync(); !synced) return synced;  // dirty pages are not dropped
    if (const int error = ::posix_fadvise(file->fd(), 0, 0, POSIX_FADV_DONTNEED); error != 0)
      return fail_errno(error, "cannot drop the cached pages of {}", file->path());
  }
  return {};
}

}  // namespace tokendepot
