#include "store/segment_contents.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace tokendepot {

bool SegmentContents::cover(Held& held, uint64_t begin, uint64_t end) {
  auto next = held.covered.lower_bound(begin);
  if (next != held.covered.end() && next->first < end) return false;
  if (next != held.covered.begin()) {
    const auto before = std::prev(next);
    if (before->second > begin) return false;
    if (before->second == begin) {
      begin = before->first;
      held.covered.erase(before);
    }
  }
  if (next != held.covered.end() && next->first == end) {
    end = next->second;
    held.covered.erase(next);
  }
  held.covered.emplace(begin, end);
  return true;
}

void SegmentContents::note_age(Held& held, uint64_t end, uint64_t time_ns) {
  auto& ages = held.ages;
  const auto group = std::ranges::lower_bound(ages, end, {}, &AgeGroup::end);
  if (group != ages.end()) {  // told out of order: it expires with the group that it lies in
    group->newest_ns = std::max(group->newest_ns, time_ns);
    return;
  }
  ages.push_back({end, time_ns});
  if (ages.size() <= kMostAges) return;
  // The two neighbours that together cover the least time become one: the earlier of them expires late by no
  // more than that. The first group has no beginning to measure from and stays.
  size_t closest = 1;
  uint64_t least = UINT64_MAX;
  for (size_t i = 1; i + 1 < ages.size(); ++i) {
    const uint64_t from = ages[i - 1].newest_ns;
    const uint64_t covered = std::max(ages[i + 1].newest_ns, from) - from;
    if (covered < least) {
      least = covered;
      closest = i;
    }
  }
  ages[closest + 1].newest_ns = std::max(ages[closest].newest_ns, ages[closest + 1].newest_ns);
  ages.erase(ages.begin() + static_cast<ptrdiff_t>(closest));
}

void SegmentContents::put(uint32_t slot, const Record& put) {
  const uint64_t offset = put.where.offset;
  const uint64_t end = offset + put.where.bytes;
  std::lock_guard lock(mutex_);
  if (places_ >= most_places_) return;
  Held& held = segments_[slot];
  auto tenant = std::ranges::find(held.tenants, put.ns_prefix, &Tenant::ns_prefix);
  if (tenant == held.tenants.end() && held.tenants.size() == kMostTenants) return;
  const size_t before = held.covered.size();
  if (!cover(held, offset, end)) return;
  places_ += held.covered.size() - before;
  if (tenant == held.tenants.end())
    tenant = held.tenants.insert(held.tenants.end(), {.ns_prefix = put.ns_prefix, .bytes = 0});
  tenant->bytes += put.where.bytes;
  if (tenant != held.tenants.begin()) places_ += held.of_others.emplace(offset, put.ns_prefix).second;
  note_age(held, end, put.time_ns);
  if (watched_.contains(put.key)) held.pinned.insert(offset);
}

uint64_t SegmentContents::condemn_extent(uint32_t slot, const Record& condemnation) {
  std::lock_guard lock(mutex_);
  const auto found = segments_.find(slot);
  if (found == segments_.end() || found->second.tenants.empty()) return 0;
  Held& held = found->second;
  const auto inside = held.covered.upper_bound(condemnation.where.offset);
  if (inside == held.covered.begin() || std::prev(inside)->second <= condemnation.where.offset) return 0;
  held.pinned.erase(condemnation.where.offset);
  uint64_t ns = held.tenants[0].ns_prefix;
  if (const auto other = held.of_others.find(condemnation.where.offset); other != held.of_others.end()) {
    ns = other->second;
    held.of_others.erase(other);
    --places_;
  }
  const auto tenant = std::ranges::find(held.tenants, ns, &Tenant::ns_prefix);
  const uint64_t bytes = std::min(tenant->bytes, condemnation.where.bytes);
  tenant->bytes -= bytes;
  return bytes;
}

uint64_t SegmentContents::condemn_segment(uint32_t slot) {
  std::lock_guard lock(mutex_);
  const auto found = segments_.find(slot);
  if (found == segments_.end()) return 0;
  const uint64_t bytes = found->second.bytes();
  places_ -= found->second.covered.size() + found->second.of_others.size();
  segments_.erase(found);
  return bytes;
}

void SegmentContents::watch(std::set<Key> keys) {
  std::lock_guard lock(mutex_);
  watched_ = std::move(keys);
  for (auto& [slot, held] : segments_) held.pinned.clear();
}

void SegmentContents::mark(uint32_t slot, const Record& put) {
  std::lock_guard lock(mutex_);
  const auto found = segments_.find(slot);
  if (found != segments_.end() && watched_.contains(put.key)) found->second.pinned.insert(put.where.offset);
}

std::map<uint32_t, SegmentContents::Segment> SegmentContents::snapshot() const {
  std::lock_guard lock(mutex_);
  std::map<uint32_t, Segment> copy;
  for (const auto& [slot, held] : segments_) {
    Segment& segment = copy.emplace(slot, held).first->second;
    segment.pinned_extents = held.pinned.size();
  }
  return copy;
}

}  // namespace tokendepot
