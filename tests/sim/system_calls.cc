// What the linker sends here instead of to the C library (the --wrap list in CMakeLists.txt): files. Paths
// under kMount and descriptors of the simulated disk go there, everything else on to the system.
#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstring>
#include <set>
#include <string_view>

#include "disk.h"

namespace tokendepot::sim {
namespace {

constexpr int kFirstFd = 1'000'000;

bool ours(const char* path) {
  return simulating() && std::string_view(path).starts_with(kMount);
}
bool ours(int fd) {
  return fd >= kFirstFd;
}

template <typename T>
T answer(T result) {
  if (result >= 0) return result;
  errno = static_cast<int>(-result);
  return -1;
}

void fill(struct stat& out, const Disk::Status& found) {
  out = {};
  out.st_dev = 1;
  out.st_ino = found.inode;
  out.st_mode = (found.directory ? S_IFDIR | 0700 : S_IFREG | 0600);
  out.st_size = static_cast<off_t>(found.bytes);
}

int status_of(const char* path, struct stat* out) {
  Disk::Status found;
  const int result = disk().status(path, found);
  if (result == 0) fill(*out, found);
  return answer(result);
}

struct Listing {
  int fd = -1;
  std::string path;
  std::vector<std::string> names;
  size_t next = 0;
  dirent entry{};
};
std::set<const void*> listings;
std::set<const void*> mapped;

}  // namespace

extern "C" {

int __real_open(const char* path, int flags, ...);
int __real_close(int fd);
ssize_t __real_pread(int fd, void* out, size_t bytes, off_t offset);
ssize_t __real_pwrite(int fd, const void* bytes, size_t count, off_t offset);
int __real_fstat(int fd, struct stat* out);
int __real_lstat(const char* path, struct stat* out);
int __real_fstatat(int fd, const char* name, struct stat* out, int flags);
int __real_mkdir(const char* path, mode_t mode);
int __real_rename(const char* from, const char* to);
int __real_unlink(const char* path);
int __real_link(const char* from, const char* to);
int __real_fallocate(int fd, int mode, off_t offset, off_t bytes);
int __real_ftruncate(int fd, off_t bytes);
int __real_fdatasync(int fd);
int __real_fcntl(int fd, int command, ...);
DIR* __real_fdopendir(int fd);
dirent* __real_readdir(DIR* directory);
int __real_closedir(DIR* directory);
int __real_statfs(const char* path, struct statfs* out);
int __real_access(const char* path, int mode);
void* __real_mmap(void* address, size_t bytes, int protection, int flags, int fd, off_t offset);
int __real_munmap(void* address, size_t bytes);
int __real_madvise(void* address, size_t bytes, int advice);
ssize_t __real_getrandom(void* out, size_t bytes, unsigned flags);
int __real_RAND_bytes(unsigned char* out, int bytes);

int __wrap_open(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const int mode = (flags & O_CREAT) != 0 ? va_arg(rest, int) : 0;
  va_end(rest);
  return ours(path) ? answer(disk().open(path, flags)) : __real_open(path, flags, mode);
}

int __wrap_close(int fd) {
  return ours(fd) ? answer(disk().close(fd)) : __real_close(fd);
}

ssize_t __wrap_pread(int fd, void* out, size_t bytes, off_t offset) {
  if (!ours(fd)) return __real_pread(fd, out, bytes, offset);
  return answer(disk().read(fd, static_cast<std::byte*>(out), bytes, static_cast<uint64_t>(offset)));
}

ssize_t __wrap_pwrite(int fd, const void* bytes, size_t count, off_t offset) {
  if (!ours(fd)) return __real_pwrite(fd, bytes, count, offset);
  return answer(disk().write(fd, static_cast<const std::byte*>(bytes), count, static_cast<uint64_t>(offset)));
}

int __wrap_fstat(int fd, struct stat* out) {
  if (!ours(fd)) return __real_fstat(fd, out);
  Disk::Status found;
  const int result = disk().status(fd, found);
  if (result == 0) fill(*out, found);
  return answer(result);
}

int __wrap_lstat(const char* path, struct stat* out) {
  return ours(path) ? status_of(path, out) : __real_lstat(path, out);
}

int __wrap_fstatat(int fd, const char* name, struct stat* out, int flags) {
  if (!ours(fd)) return __real_fstatat(fd, name, out, flags);
  std::string path;
  for (const void* listing : listings) {
    if (static_cast<const Listing*>(listing)->fd == fd) path = static_cast<const Listing*>(listing)->path;
  }
  return status_of((path + "/" + name).c_str(), out);
}

int __wrap_mkdir(const char* path, mode_t mode) {
  return ours(path) ? answer(disk().make_directory(path)) : __real_mkdir(path, mode);
}

int __wrap_rename(const char* from, const char* to) {
  return ours(from) ? answer(disk().rename(from, to)) : __real_rename(from, to);
}

int __wrap_unlink(const char* path) {
  return ours(path) ? answer(disk().unlink(path)) : __real_unlink(path);
}

int __wrap_link(const char* from, const char* to) {
  return ours(from) ? answer(disk().link(from, to)) : __real_link(from, to);
}

int __wrap_fallocate(int fd, int mode, off_t offset, off_t bytes) {
  if (!ours(fd)) return __real_fallocate(fd, mode, offset, bytes);
  return answer(disk().allocate(fd, static_cast<uint64_t>(offset + bytes)));
}

int __wrap_ftruncate(int fd, off_t bytes) {
  return ours(fd) ? answer(disk().truncate(fd, static_cast<uint64_t>(bytes))) : __real_ftruncate(fd, bytes);
}

int __wrap_fdatasync(int fd) {
  return ours(fd) ? answer(disk().flush(fd)) : __real_fdatasync(fd);
}

int __wrap_fcntl(int fd, int command, ...) {
  va_list rest;
  va_start(rest, command);
  void* const argument = va_arg(rest, void*);
  va_end(rest);
  if (!ours(fd)) return __real_fcntl(fd, command, argument);
  switch (command) {
    case F_GETFL:
      return disk().flags(fd);
    case F_SETFL:
      return answer(disk().set_flags(fd, static_cast<int>(reinterpret_cast<intptr_t>(argument))));
    case F_OFD_SETLK:
      return answer(disk().lock(fd));
    case F_OFD_GETLK: {
      bool locked = false;
      const int result = disk().locked_by_another(fd, locked);
      if (result == 0) static_cast<struct flock*>(argument)->l_type = locked ? F_WRLCK : F_UNLCK;
      return answer(result);
    }
    default:
      return answer(-EINVAL);
  }
}

DIR* __wrap_fdopendir(int fd) {
  if (!ours(fd)) return __real_fdopendir(fd);
  auto* const listing = new Listing;
  listing->fd = fd;
  if (answer(disk().list(fd, listing->names, listing->path)) != 0) {
    delete listing;
    return nullptr;
  }
  listings.insert(listing);
  return reinterpret_cast<DIR*>(listing);
}

dirent* __wrap_readdir(DIR* directory) {
  if (!listings.contains(directory)) return __real_readdir(directory);
  auto* const listing = reinterpret_cast<Listing*>(directory);
  if (listing->next == listing->names.size()) return nullptr;
  const std::string& name = listing->names[listing->next++];
  std::strncpy(listing->entry.d_name, name.c_str(), sizeof listing->entry.d_name - 1);
  return &listing->entry;
}

int __wrap_closedir(DIR* directory) {
  if (!listings.contains(directory)) return __real_closedir(directory);
  auto* const listing = reinterpret_cast<Listing*>(directory);
  listings.erase(listing);
  const int fd = listing->fd;
  delete listing;
  return answer(disk().close(fd));
}

int __wrap_statfs(const char* path, struct statfs* out) {
  if (!ours(path)) return __real_statfs(path, out);
  Disk::Space space;
  if (answer(disk().space(path, space)) != 0) return -1;
  *out = {};
  out->f_type = space.memory ? TMPFS_MAGIC : EXT4_SUPER_MAGIC;
  out->f_bsize = out->f_frsize = 1;
  out->f_blocks = space.total;
  out->f_bfree = out->f_bavail = space.available;
  return 0;
}

int __wrap_access(const char* path, int mode) {
  if (!ours(path)) return __real_access(path, mode);
  Disk::Status found;
  return answer(disk().status(path, found));
}

void* __wrap_mmap(void* address, size_t bytes, int protection, int flags, int fd, off_t offset) {
  if (!ours(fd)) return __real_mmap(address, bytes, protection, flags, fd, offset);
  std::byte* const memory = disk().map(fd, bytes);
  mapped.insert(memory);
  return memory;
}

int __wrap_munmap(void* address, size_t bytes) {
  return mapped.contains(address) ? 0 : __real_munmap(address, bytes);
}

int __wrap_madvise(void* address, size_t bytes, int advice) {
  return mapped.contains(address) ? 0 : __real_madvise(address, bytes, advice);
}

int __wrap_RAND_bytes(unsigned char* out, int bytes) {
  if (!simulating()) return __real_RAND_bytes(out, bytes);
  for (int i = 0; i < bytes; ++i) out[i] = static_cast<unsigned char>(chance().next());
  return 1;
}

ssize_t __wrap_getrandom(void* out, size_t bytes, unsigned flags) {
  if (!simulating()) return __real_getrandom(out, bytes, flags);
  __wrap_RAND_bytes(static_cast<unsigned char*>(out), static_cast<int>(bytes));
  return static_cast<ssize_t>(bytes);
}

}  // extern "C"

}  // namespace tokendepot::sim
