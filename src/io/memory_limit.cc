#include "io/memory_limit.h"

#include <sys/sysinfo.h>

#include <algorithm>
#include <array>
#include <ranges>
#include <string_view>
#include <vector>

#include "io/kernel_file.h"

namespace tokendepot {
namespace {

struct Version {
  const char* directory;
  const char* limit;
  const char* usage;
  std::array<std::string_view, 3> reclaimable;  // lines of memory.stat, of the groups below, too
};

constexpr Version kVersion1{"/sys/fs/cgroup/memory",
                            "memory.limit_in_bytes",
                            "memory.usage_in_bytes",
                            {"total_inactive_file", "total_active_file"}};
constexpr Version kVersion2{
    "/sys/fs/cgroup", "memory.max", "memory.current", {"inactive_file", "active_file", "slab_reclaimable"}};

/// "max", and whatever else is no number, is none.
std::optional<uint64_t> bytes_in(std::string_view text) {
  const auto value = number_in(text);
  return value && *value >= 0 ? std::optional(static_cast<uint64_t>(*value)) : std::nullopt;
}

std::optional<uint64_t> bytes_at(const std::string& path) {
  return bytes_in(kernel_text(path));
}

uint64_t reclaimable_bytes(const std::string& group, const Version& version) {
  const std::string text = kernel_text(group + "/memory.stat");
  uint64_t sum = 0;
  for (const auto line : text | std::views::split('\n')) {
    const auto [name, value] = cut_at(std::string_view(line), ' ');
    if (std::ranges::find(version.reclaimable, name) != version.reclaimable.end())
      sum += bytes_in(value).value_or(0);
  }
  return sum;
}

uint64_t less(uint64_t from, uint64_t what) {
  return from - std::min(from, what);
}

uint64_t machine_bytes() {
  struct sysinfo info{};
  ::sysinfo(&info);
  return info.totalram * uint64_t{info.mem_unit};
}

bool has_memory_controller(std::string_view controllers) {
  for (const auto part : controllers | std::views::split(',')) {
    if (std::string_view(part) == "memory") return true;
  }
  return false;
}

/// `path` and what is above it, the innermost first. A group outside the ones that this process may see has
/// a path of "..", under which the files are those of others.
std::vector<std::string> groups_of(std::string_view path) {
  std::vector<std::string> groups{""};
  if (path.contains("..")) return groups;
  for (const auto part : path | std::views::split('/')) {
    const std::string_view name(part);
    if (!name.empty()) groups.push_back(groups.back() + "/" + std::string(name));
  }
  std::ranges::reverse(groups);
  return groups;
}

}  // namespace

std::optional<MemoryLimit> memory_limit(const std::string& top) {
  std::optional<MemoryLimit> found;
  const uint64_t machine = machine_bytes();
  const std::string memberships = kernel_text(top + "/proc/self/cgroup");
  for (const auto part : memberships | std::views::split('\n')) {
    const std::string_view line(part);
    // hierarchy:controllers:path, and the path may have colons
    if (std::ranges::count(line, ':') < 2) continue;
    const auto [controllers, path] = cut_at(cut_at(line, ':').second, ':');
    if (!controllers.empty() && !has_memory_controller(controllers)) continue;
    const Version& version = controllers.empty() ? kVersion2 : kVersion1;
    // A container often sees its own group as the top, under the path that it has on the host: what is not
    // there is passed over.
    for (const std::string& group : groups_of(path)) {
      const std::string shown = version.directory + group;
      const std::string place = top + shown;
      const auto limit = bytes_at(place + "/" + version.limit);
      // Version 1 says "none" with a number that no machine has.
      if (!limit || *limit >= machine) continue;
      const uint64_t usage = bytes_at(place + "/" + version.usage).value_or(0);
      const uint64_t unused = less(*limit, less(usage, reclaimable_bytes(place, version)));
      if (!found || *limit < found->bytes) {
        found = MemoryLimit{*limit, shown + "/" + version.limit,
                            found ? std::min(found->unused_bytes, unused) : unused};
      } else {
        found->unused_bytes = std::min(found->unused_bytes, unused);
      }
    }
  }
  return found;
}

}  // namespace tokendepot
