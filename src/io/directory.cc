#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "base/errors.h"
#include "io/file.h"
#include "io/mount_table.h"
#include "io/scratch_file.h"

namespace tokendepot {
namespace {

struct CloseDirectory {
  void operator()(DIR* directory) const { ::closedir(directory); }
};

struct KnownFileSystem {
  uint32_t magic;
  const char* type;
  bool network = false;
};

// Most of the network file systems are not in the kernel's header. FUSE may be one.
constexpr KnownFileSystem kFileSystems[] = {
    {TMPFS_MAGIC, "tmpfs"},
    {RAMFS_MAGIC, "ramfs"},
    {HUGETLBFS_MAGIC, "hugetlbfs"},
    {EXT4_SUPER_MAGIC, "ext4"},
    {XFS_SUPER_MAGIC, "xfs"},
    {BTRFS_SUPER_MAGIC, "btrfs"},
    {OVERLAYFS_SUPER_MAGIC, "overlay"},
    {NFS_SUPER_MAGIC, "nfs", true},
    {F2FS_SUPER_MAGIC, "f2fs"},
    {FUSE_SUPER_MAGIC, "fuse", true},
    {CEPH_SUPER_MAGIC, "ceph", true},
    {V9FS_MAGIC, "9p", true},
    {0x0bd00bd0, "lustre", true},
    {0x47504653, "gpfs", true},
    {0x2fc12fc1, "zfs"},
    {0x19830326, "beegfs", true},
    {0xff534d42, "cifs", true},
    {0xfe534d42, "smb2", true},
};

}  // namespace

Result<std::vector<DirectoryEntry>> list_directory(
    const std::string& path,
    const std::function<std::optional<uint64_t>(const std::string& name)>& known_bytes) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return fail_errno(errno, "cannot open directory {}", path);
  const std::unique_ptr<DIR, CloseDirectory> directory(::fdopendir(fd));
  if (!directory) {
    const int error = errno;
    ::close(fd);
    return fail_errno(error, "cannot read directory {}", path);
  }

  std::vector<DirectoryEntry> entries;
  for (;;) {
    errno = 0;
    const dirent* found = ::readdir(directory.get());
    if (found == nullptr) {
      if (errno != 0) return fail_errno(errno, "cannot read directory {}", path);
      return entries;
    }
    if (std::strcmp(found->d_name, ".") == 0 || std::strcmp(found->d_name, "..") == 0) continue;
    if (const auto bytes =
            found->d_type == DT_REG && known_bytes ? known_bytes(found->d_name) : std::nullopt) {
      entries.push_back({found->d_name, *bytes, true});
      continue;
    }
    struct stat info;
    if (::fstatat(fd, found->d_name, &info, AT_SYMLINK_NOFOLLOW) != 0) {
      if (errno == ENOENT) continue;  // removed by somebody since readdir
      return fail_errno(errno, "cannot stat {}/{}", path, found->d_name);
    }
    const bool regular = S_ISREG(info.st_mode);
    entries.push_back({found->d_name, regular ? static_cast<uint64_t>(info.st_size) : 0, regular});
  }
}

std::string parent_of(const std::string& path) {
  const size_t end = path.find_last_not_of('/');
  if (end == std::string::npos) return path.empty() ? "." : "/";
  const size_t slash = path.rfind('/', end);
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

Status make_directory(const std::string& path) {
  if (::mkdir(path.c_str(), 0700) == 0) return {};
  const int error = errno;
  // A read-only file system answers EROFS before it looks whether the directory is there.
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0) return fail_errno(error, "cannot create directory {}", path);
  if (S_ISDIR(info.st_mode)) return {};
  return fail(ErrorKind::invalid_argument, "{} is {}, expected a directory", path,
              S_ISLNK(info.st_mode) ? "a symbolic link" : "a file");
}

Status rename_file(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) return fail_errno(errno, "cannot rename {} to {}", from, to);
  return {};
}

Status remove_file(const std::string& path) {
  if (::unlink(path.c_str()) != 0) return fail_errno(errno, "cannot remove {}", path);
  return {};
}

namespace {

Status rename_or_remove(const std::string& temporary, const std::string& path) {
  Status status = rename_file(temporary, path);
  if (!status) ::unlink(temporary.c_str());
  return status;
}

/// Makes `temporary` with these bytes and flushes it: without the flush a power failure may leave a new name
/// with no bytes behind it.
Status write_and_flush(const std::string& temporary, std::span<const std::byte> bytes) {
  Result<File> file = File::open(temporary, {.write = true, .create = true, .exclusive = true});
  if (!file) return std::unexpected(file.error());
  Status status = file->write_at(bytes, 0);
  if (status) status = file->sync();
  if (!status) ::unlink(temporary.c_str());
  return status;
}

}  // namespace

Status write_file_atomically(const std::string& path, std::span<const std::byte> bytes) {
  const std::string temporary = temporary_path(parent_of(path));
  if (auto written = write_and_flush(temporary, bytes); !written) return written;
  return rename_or_remove(temporary, path);
}

Result<bool> write_new_file_atomically(const std::string& path, std::span<const std::byte> bytes) {
  const std::string temporary = temporary_path(parent_of(path));
  if (auto written = write_and_flush(temporary, bytes); !written) return std::unexpected(written.error());
  const int error = ::link(temporary.c_str(), path.c_str()) == 0 ? 0 : errno;
  if (error == EPERM || error == EOPNOTSUPP || error == ENOSYS || error == EMLINK) {
    // No hard links here.
    if (auto renamed = rename_or_remove(temporary, path); !renamed) return std::unexpected(renamed.error());
    return true;
  }
  ::unlink(temporary.c_str());
  if (error == EEXIST) return false;
  if (error != 0) return fail_errno(error, "cannot make {}", path);
  return true;
}

Result<std::vector<std::byte>> read_file(const std::string& path, uint64_t limit) {
  const Result<File> file = File::open(path, {});
  if (!file) return std::unexpected(file.error());
  const Result<uint64_t> size = file->size();
  if (!size) return std::unexpected(size.error());
  if (*size > limit) return fail(ErrorKind::io, "{} has {} bytes, expected at most {}", path, *size, limit);
  std::vector<std::byte> content(*size);
  if (Status status = file->read_at(content, 0); !status) return std::unexpected(status.error());
  return content;
}

Result<FileSystemInfo> file_system_of(const std::string& path) {
  struct statfs found;
  int result;
  do {
    result = ::statfs(path.c_str(), &found);
  } while (result != 0 && errno == EINTR);
  if (result != 0) return fail_errno(errno, "cannot examine the file system of {}", path);

  const auto magic = static_cast<uint32_t>(found.f_type);
  const uint64_t unit = static_cast<uint64_t>(found.f_frsize != 0 ? found.f_frsize : found.f_bsize);
  FileSystemInfo info;
  for (const KnownFileSystem& known : kFileSystems) {
    if (known.magic != magic) continue;
    info.type = known.type;
    info.network = known.network;
  }
  if (info.type.empty()) {
    info.type = mounted_type_of(path);
    info.network = is_shared_type(info.type);
  }
  if (info.type.empty()) info.type = fmt::format("0x{:x}", magic);
  info.total_bytes = found.f_blocks * unit;
  info.available_bytes = found.f_bavail * unit;
  info.memory = magic == TMPFS_MAGIC || magic == RAMFS_MAGIC || magic == HUGETLBFS_MAGIC;
  // hugetlbfs has a limit of its own.
  if (magic == TMPFS_MAGIC || magic == RAMFS_MAGIC) info.memory_limit = memory_limit();
  if (info.memory_limit)
    info.available_bytes = std::min(info.available_bytes, info.memory_limit->unused_bytes);
  info.read_only = (static_cast<uint64_t>(found.f_flags) & ST_RDONLY) != 0;
  return info;
}

}  // namespace tokendepot
