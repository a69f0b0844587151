#include "device/host_slab.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <iterator>

#include "base/check.h"
#include "base/log.h"

namespace tokendepot {

HostSlab::HostSlab(uint64_t bytes) {
  const uint64_t rounded = align_up(bytes);
  if (rounded == 0) return;
  void* memory =
      mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    log(LogLevel::error, "slab of {} bytes: {}; loads and stores that need staging memory will fail", rounded,
        std::strerror(errno));
    return;
  }
  base_ = static_cast<std::byte*>(memory);
  size_ = rounded;
  free_.emplace(0, size_);
}

HostSlab::~HostSlab() {
  if (base_ != nullptr) munmap(base_, size_);
}

std::byte* HostSlab::allocate(uint64_t bytes) {
  if (bytes == 0 || bytes > size_) return nullptr;
  const uint64_t wanted = align_up(bytes);
  const std::lock_guard lock(mutex_);
  for (auto range = free_.begin(); range != free_.end(); ++range) {
    const auto [offset, available] = *range;
    if (available < wanted) continue;
    free_.erase(range);
    if (available > wanted) free_.emplace(offset + wanted, available - wanted);
    used_.emplace(offset, wanted);
    return base_ + offset;
  }
  return nullptr;
}

void HostSlab::release(std::byte* range) {
  const std::lock_guard lock(mutex_);
  const auto used = used_.find(uint64_t(range - base_));
  TD_CHECK(used != used_.end());
  uint64_t offset = used->first;
  uint64_t bytes = used->second;
  used_.erase(used);

  const auto after = free_.lower_bound(offset);
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == offset) {
      offset = before->first;
      bytes += before->second;
    }
  }
  if (after != free_.end() && offset + bytes == after->first) {
    bytes += after->second;
    free_.erase(after);
  }
  free_[offset] = bytes;
}

}  // namespace tokendepot
