// Owned file descriptors and the few calls that the engine makes on them. Every error names the path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "io/memory_limit.h"
#include "tokendepot/error.h"

namespace tokendepot {

class File {
 public:
  File() = default;
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  struct Flags {
    bool write = false;
    bool create = false;     // with write; mode 0600
    bool exclusive = false;  // with create: the file must not exist
    bool direct = false;     // O_DIRECT; `unsupported` when the file system refuses it at open
  };
  /// Opens a regular file. Never follows a symbolic link in the last component; anything but a regular file
  /// is `invalid_argument`. O_CLOEXEC always.
  static Result<File> open(const std::string& path, Flags flags);

  int fd() const { return fd_; }
  const std::string& path() const { return path_; }
  bool is_open() const { return fd_ >= 0; }
  /// Whether it was opened with O_DIRECT.
  bool is_direct() const;

  Result<uint64_t> size() const;
  /// What it occupies on the medium: less than size() where it has holes or the file system compresses. Some
  /// file systems tell too little, or late.
  Result<uint64_t> allocated() const;
  /// Reads or writes everything, repeating short transfers; a transfer that ends early is `io` (end of file:
  /// `not_found`). Retries EINTR.
  Status read_at(std::span<std::byte> out, uint64_t offset) const;
  Status write_at(std::span<const std::byte> bytes, uint64_t offset) const;
  /// Allocates [0, bytes) so that later writes cannot fail for want of space. Falls back to writing zeros
  /// where fallocate is not supported (EOPNOTSUPP, EINVAL). Shrinks nothing.
  Status preallocate(uint64_t bytes) const;
  Status truncate(uint64_t bytes) const;
  Status sync() const;  // fdatasync
  /// The kernel forgets what it has read of it: the next read asks the file system.
  void drop_cached() const;
  /// A second descriptor of the same open file; a lock belongs to both.
  Result<File> duplicate() const;
  /// Whether path() still names this very file: false after it was renamed, replaced or removed.
  bool is_at_its_path() const;
  /// Its path certainly leads nowhere, or to another file. False where the file system does not answer.
  bool was_removed() const;

  /// Open-file-description lock over the whole file, never waiting. False = somebody else (another process,
  /// or another open of this process) has it. Freed when the last copy of the descriptor closes, also by kill
  /// -9.
  Result<bool> try_lock_exclusive() const;
  /// Whether somebody else has that lock now. Takes nothing; works on a file opened for reading.
  Result<bool> is_locked_by_another() const;

 private:
  int fd_ = -1;
  std::string path_;
};

struct DirectoryEntry {
  std::string name;
  uint64_t bytes = 0;    // of regular files
  bool regular = false;  // false for links, directories, devices
};

/// Names in a directory, without "." and "..", in no order. Links are listed, not followed.
/// `known_bytes`, when given, tells sizes of regular files that need not be asked for; nullopt = not known.
Result<std::vector<DirectoryEntry>> list_directory(
    const std::string& path,
    const std::function<std::optional<uint64_t>(const std::string& name)>& known_bytes = {});
/// The directory that `path` is in, by its text alone: "." for a name without one, "/" for "/".
std::string parent_of(const std::string& path);
/// mkdir with mode 0700; fine when it exists as a directory; a link or another kind of file is
/// invalid_argument.
Status make_directory(const std::string& path);
Status rename_file(const std::string& from, const std::string& to);
Status remove_file(const std::string& path);
/// Writes a small file so that readers see all of it or none of it: temporary name, write, rename. 0600.
Status write_file_atomically(const std::string& path, std::span<const std::byte> bytes);
/// The same for a file that must have one content for good: false, and nothing changed, when `path` exists.
/// Of several processes at it exactly one gets true, but for file systems without hard links, where the last
/// one counts.
Result<bool> write_new_file_atomically(const std::string& path, std::span<const std::byte> bytes);
/// Whole content; `io` when larger than `limit`.
Result<std::vector<std::byte>> read_file(const std::string& path, uint64_t limit);

struct FileSystemInfo {
  std::string type;  // "tmpfs", "ext4", "overlay", ... or "0x<magic>"
  uint64_t total_bytes = 0;
  uint64_t available_bytes = 0;  // within `memory_limit`
  bool memory = false;           // tmpfs, ramfs, hugetlbfs
  bool network = false;  // other hosts may change it: what is cached here may be old, locks may be lost
  bool read_only = false;
  std::optional<MemoryLimit> memory_limit;  // where its files count in one: tmpfs, ramfs
};
Result<FileSystemInfo> file_system_of(const std::string& path);

/// Smallest power of two (512..64 KiB) that O_DIRECT accepts in `directory` for offset, length and address,
/// found by writing and reading a temporary file there; `unsupported` when direct I/O does not work,
/// `busy` when there is no memory to try it.
Result<uint32_t> probe_direct_alignment(const std::string& directory);
/// The same question where nothing can be written, of a file that is there: `unsupported` when direct I/O of
/// 4 KiB does not work. Other errors say nothing about that.
Status probe_direct_reads(const std::string& path);

}  // namespace tokendepot
