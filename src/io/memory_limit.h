// How much memory the control groups of this process allow. Files on tmpfs count in it, and the kernel ends a
// process whose group is full.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace tokendepot {

struct MemoryLimit {
  uint64_t bytes = 0;  // the smallest limit of the group and those above it
  std::string file;    // which states it
  /// The least that any of these groups has left. What the kernel takes back when memory is short, the cache
  /// of files on disks, counts as left; files on tmpfs count as taken.
  uint64_t unused_bytes = 0;
};

/// None where no group has less than the machine. Reads /proc/self/cgroup, and memory.max (version 2) or
/// memory.limit_in_bytes (version 1) below /sys/fs/cgroup, all of them below `top`, which stands for "/".
/// About 0.1 ms. Thread-safe.
std::optional<MemoryLimit> memory_limit(const std::string& top = "");

}  // namespace tokendepot
