#include "store/condemned_files.h"

#include <utility>

namespace tokendepot {

void CondemnedFiles::see(const SegmentInventory& files, const SegmentTable& segments, RootIndex root) {
  const uint64_t now = clock_.steady_ns();
  std::lock_guard lock(mutex_);
  std::map<SegmentId, Condemned> condemned;
  files.for_each_segment([&](const SegmentId& id, uint64_t bytes) {
    const auto slot = segments.find(id);
    if (!slot || !segments.condemned(*slot, root)) return;
    auto known = condemned_.extract(id);
    if (known) {
      known.mapped().bytes = bytes;
      condemned.insert(std::move(known));
    } else {
      condemned[id] = {bytes, now, {}};
    }
  });
  condemned_ = std::move(condemned);
}

void CondemnedFiles::add(const SegmentId& id, uint64_t bytes, SegmentMapping mapping) {
  std::lock_guard lock(mutex_);
  condemned_[id] = {bytes, clock_.steady_ns(), std::move(mapping)};
}

std::optional<CondemnedFiles::Leaving> CondemnedFiles::take(
    uint64_t wanted_bytes, bool at_once, const std::function<bool(const SegmentId&)>& in_use) {
  const uint64_t now = clock_.steady_ns();
  std::lock_guard lock(mutex_);
  auto best = condemned_.end();
  for (auto at = condemned_.begin(); at != condemned_.end(); ++at) {
    if (!at_once && now - at->second.since_ns < grace_ns_) continue;
    if (in_use(at->first)) continue;
    const auto rank = [&](const auto& entry) {
      return std::pair(entry.second.bytes != wanted_bytes, entry.second.since_ns);
    };
    if (best == condemned_.end() || rank(*at) < rank(*best)) best = at;
  }
  if (best == condemned_.end()) return std::nullopt;
  Leaving leaving{best->first, best->second.bytes, std::move(best->second.mapping)};
  condemned_.erase(best);
  return leaving;
}

bool CondemnedFiles::may_go(const SegmentId& id) const {
  const uint64_t now = clock_.steady_ns();
  std::lock_guard lock(mutex_);
  const auto found = condemned_.find(id);
  return found != condemned_.end() && now - found->second.since_ns >= grace_ns_;
}

bool CondemnedFiles::contains(const SegmentId& id) const {
  std::lock_guard lock(mutex_);
  return condemned_.contains(id);
}

uint64_t CondemnedFiles::bytes() const {
  std::lock_guard lock(mutex_);
  uint64_t total = 0;
  for (const auto& [id, file] : condemned_) total += file.bytes;
  return total;
}

std::map<SegmentId, uint64_t> CondemnedFiles::files() const {
  std::lock_guard lock(mutex_);
  std::map<SegmentId, uint64_t> found;
  for (const auto& [id, file] : condemned_) found.emplace(id, file.bytes);
  return found;
}

}  // namespace tokendepot
