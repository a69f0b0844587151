#include "io/mount_table.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <ranges>

#include "io/kernel_file.h"

namespace tokendepot {
namespace {

constexpr std::array<std::string_view, 15> kSharedTypes{"afs",       "beegfs", "ceph",     "cifs",  "gfs2",
                                                        "glusterfs", "gpfs",   "lustre",   "nfs4",  "nfs",
                                                        "smb3",      "ocfs2",  "orangefs", "panfs", "wekafs"};

}  // namespace

std::string mounted_type(std::string_view table, uint64_t mount_id) {
  for (const auto part : table | std::views::split('\n')) {
    const std::string_view line(part);
    const auto id = number_in(cut_at(line, ' ').first);
    if (!id || *id < 0 || static_cast<uint64_t>(*id) != mount_id) continue;
    // The number of fields before it varies. Blanks in paths are written in octal.
    constexpr std::string_view kSeparator = " - ";
    const size_t separator = line.find(kSeparator);
    if (separator == std::string_view::npos) return "";
    return std::string(cut_at(line.substr(separator + kSeparator.size()), ' ').first);
  }
  return "";
}

bool is_shared_type(std::string_view type) {
  return type.starts_with("fuse") || std::ranges::find(kSharedTypes, type) != kSharedTypes.end();
}

std::string mounted_type_of(const std::string& path) {
  struct statx found{};
  if (::statx(AT_FDCWD, path.c_str(), AT_STATX_DONT_SYNC, STATX_MNT_ID, &found) != 0) return "";
  if ((found.stx_mask & STATX_MNT_ID) == 0) return "";
  return mounted_type(kernel_text("/proc/self/mountinfo"), found.stx_mnt_id);
}

}  // namespace tokendepot
