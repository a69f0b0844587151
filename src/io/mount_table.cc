#include "io/mount_table.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <fstream>
#include <iterator>
#include <ranges>

namespace tokendepot {
namespace {

constexpr std::array<std::string_view, 15> kSharedTypes{"afs",       "beegfs", "ceph",     "cifs",  "gfs2",
                                                        "glusterfs", "gpfs",   "lustre",   "nfs4",  "nfs",
                                                        "smb3",      "ocfs2",  "orangefs", "panfs", "wekafs"};

std::string_view first_word(std::string_view text) {
  return text.substr(0, text.find(' '));
}

}  // namespace

std::string mounted_type(std::string_view table, uint64_t mount_id) {
  for (const auto part : table | std::views::split('\n')) {
    const std::string_view line(part);
    uint64_t id = 0;
    const std::string_view word = first_word(line);
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (error != std::errc() || end != word.data() + word.size() || id != mount_id) continue;
    // The number of fields before it varies. Blanks in paths are written in octal.
    constexpr std::string_view kSeparator = " - ";
    const size_t separator = line.find(kSeparator);
    if (separator == std::string_view::npos) return "";
    return std::string(first_word(line.substr(separator + kSeparator.size())));
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
  std::ifstream file("/proc/self/mountinfo");
  const std::string table(std::istreambuf_iterator<char>(file), {});
  return mounted_type(table, found.stx_mnt_id);
}

}  // namespace tokendepot
