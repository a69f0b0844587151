#include "device/range_slab.h"

#include <iterator>

#include "base/check.h"

namespace tokendepot {

RangeSlab::RangeSlab(std::byte* base, uint64_t bytes) : base_(base), size_(bytes / kPageBytes * kPageBytes) {
  if (size_ > 0) free_.emplace(0, size_);
}

std::byte* RangeSlab::allocate(uint64_t bytes) {
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

void RangeSlab::release(std::byte* range) {
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
