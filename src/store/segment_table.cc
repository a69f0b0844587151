#include "store/segment_table.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/check.h"

namespace tokendepot {

uint32_t SegmentTable::slot_of(const SegmentId& id) {
  {
    std::shared_lock lock(mutex_);
    if (const auto found = slots_.find(id); found != slots_.end()) return found->second;
  }
  std::unique_lock lock(mutex_);
  const auto [place, fresh] = slots_.try_emplace(id, static_cast<uint32_t>(segments_.size()));
  if (fresh) {
    const uint32_t block = place->second / kBlock;
    TD_CHECK(block < kBlocks);
    if (masks_[block].load(std::memory_order_relaxed) == nullptr) {
      mask_owner_.push_back(std::make_unique<MaskBlock>());
      masks_[block].store(mask_owner_.back().get(), std::memory_order_release);
    }
    segments_.emplace_back().id = id;
  }
  return place->second;
}

size_t SegmentTable::size() const {
  std::shared_lock lock(mutex_);
  return segments_.size();
}

std::optional<uint32_t> SegmentTable::find(const SegmentId& id) const {
  std::shared_lock lock(mutex_);
  const auto found = slots_.find(id);
  return found == slots_.end() ? std::nullopt : std::optional(found->second);
}

SegmentId SegmentTable::id_of(uint32_t slot) const {
  std::shared_lock lock(mutex_);
  return segments_[slot].id;
}

uint32_t SegmentTable::next_sequence(uint64_t writer) const {
  std::shared_lock lock(mutex_);
  const auto behind = slots_.upper_bound({writer, UINT32_MAX});
  if (behind == slots_.begin()) return 0;
  const SegmentId& last = std::prev(behind)->first;
  return last.writer == writer ? last.sequence + 1 : 0;
}

void SegmentTable::publish_mask(uint32_t slot) {
  uint8_t mask = 0;
  for (RootIndex r = 0; r < kMaxRoots; ++r) {
    const PerRoot& root = segments_[slot].roots[r];
    if (root.present && !root.condemned) mask |= static_cast<uint8_t>(1u << r);
  }
  MaskBlock* block = masks_[slot / kBlock].load(std::memory_order_relaxed);
  uint64_t expired = UINT64_MAX;
  for (RootIndex r = 0; r < kMaxRoots; ++r) {
    if ((mask >> r & 1u) != 0) expired = std::min(expired, segments_[slot].roots[r].expired_end);
  }
  constexpr uint64_t kMostPages = UINT32_MAX;
  block->expired[slot % kBlock].store(static_cast<uint32_t>(std::min(expired / kPageBytes, kMostPages)),
                                      std::memory_order_relaxed);
  block->present[slot % kBlock].store(mask, std::memory_order_release);
}

uint32_t SegmentTable::present_in(uint32_t slot) const {
  const MaskBlock* block = masks_[slot / kBlock].load(std::memory_order_acquire);
  return block->present[slot % kBlock].load(std::memory_order_acquire);
}

bool SegmentTable::serves(uint32_t slot, uint32_t page) const {
  const MaskBlock* block = masks_[slot / kBlock].load(std::memory_order_acquire);
  return block->present[slot % kBlock].load(std::memory_order_acquire) != 0 &&
         page >= block->expired[slot % kBlock].load(std::memory_order_relaxed);
}

void SegmentTable::set_expired(uint32_t slot, RootIndex root, uint64_t end) {
  std::unique_lock lock(mutex_);
  if (std::exchange(segments_[slot].roots[root].expired_end, end) != end) publish_mask(slot);
}

void SegmentTable::set_present(uint32_t slot, RootIndex root, uint64_t file_bytes) {
  std::unique_lock lock(mutex_);
  PerRoot& at = segments_[slot].roots[root];
  at.present = true;
  at.file_bytes = std::max(at.file_bytes, file_bytes);
  publish_mask(slot);
}

bool SegmentTable::add_extent(uint32_t slot, RootIndex root, uint64_t end, uint64_t time_ns) {
  std::unique_lock lock(mutex_);
  Segment& segment = segments_[slot];
  PerRoot& at = segment.roots[root];
  if (at.condemned) return false;
  at.used_bytes = std::max(at.used_bytes, end);
  if (++at.extents == 1) at.first_put_ns = time_ns;
  at.last_put_ns = std::max(at.last_put_ns, time_ns);
  segment.last_used_ns = std::max(segment.last_used_ns, time_ns);
  if (!std::exchange(at.present, true)) publish_mask(slot);
  return true;
}

void SegmentTable::seal(uint32_t slot, RootIndex root, uint64_t used_bytes) {
  std::unique_lock lock(mutex_);
  PerRoot& at = segments_[slot].roots[root];
  at.sealed = true;
  at.used_bytes = std::max(at.used_bytes, used_bytes);
}

void SegmentTable::mark_copies(uint32_t slot, RootIndex root) {
  std::unique_lock lock(mutex_);
  segments_[slot].roots[root].copies = true;
}

void SegmentTable::condemn(uint32_t slot, RootIndex root) {
  std::unique_lock lock(mutex_);
  segments_[slot].roots[root].condemned = true;
  publish_mask(slot);
}

bool SegmentTable::condemned(uint32_t slot, RootIndex root) const {
  std::shared_lock lock(mutex_);
  return segments_[slot].roots[root].condemned;
}

void SegmentTable::touch(uint32_t slot, uint64_t time_ns) {
  std::unique_lock lock(mutex_);
  segments_[slot].last_used_ns = std::max(segments_[slot].last_used_ns, time_ns);
}

bool SegmentTable::touch_due(uint32_t slot, uint64_t now_ns, uint64_t interval_ns) {
  std::unique_lock lock(mutex_);
  Segment& segment = segments_[slot];
  segment.last_used_ns = std::max(segment.last_used_ns, now_ns);
  // A wall clock that was set back must not silence touches for ever.
  if (segment.last_touch_record_ns <= now_ns && now_ns - segment.last_touch_record_ns < interval_ns)
    return false;
  segment.last_touch_record_ns = now_ns;
  return true;
}

void SegmentTable::acquire(uint32_t slot) {
  std::unique_lock lock(mutex_);
  ++segments_[slot].in_use;
  in_motion_.fetch_add(1, std::memory_order_relaxed);
}

void SegmentTable::release(uint32_t slot) {
  std::unique_lock lock(mutex_);
  TD_CHECK(segments_[slot].in_use > 0);
  --segments_[slot].in_use;
  in_motion_.fetch_sub(1, std::memory_order_relaxed);
}

SegmentTable::Segment SegmentTable::get(uint32_t slot) const {
  std::shared_lock lock(mutex_);
  return segments_[slot];
}

std::vector<std::pair<uint32_t, SegmentTable::Segment>> SegmentTable::present_segments(RootIndex root) const {
  std::vector<std::pair<uint32_t, Segment>> found;
  {
    std::shared_lock lock(mutex_);
    for (uint32_t slot = 0; slot < segments_.size(); ++slot) {
      const PerRoot& at = segments_[slot].roots[root];
      if (at.present && !at.condemned) found.emplace_back(slot, segments_[slot]);
    }
  }
  std::ranges::sort(found, {}, [](const auto& entry) { return entry.second.last_used_ns; });
  return found;
}

}  // namespace tokendepot
