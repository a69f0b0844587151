#include "store/rewriting.h"

#include <algorithm>
#include <vector>

#include "base/log.h"
#include "store/carry.h"
#include "store/scan.h"

namespace tokendepot {

uint64_t Rewriting::budget(const RootWriter& target) const {
  const uint64_t allowed = target.stored_bytes() / 100 * percent_;
  return allowed - std::min(allowed, bytes_ + target.written_bytes());
}

void Rewriting::carry_on(const Promotion::Tier& from, uint32_t slot, RootWriter& target,
                         const std::atomic<bool>& stop) {
  const RootIndex root = from.root->index();
  const SegmentTable::Segment segment = segments_.get(slot);
  const bool elsewhere = (segments_.present_in(slot) & ~(1u << root)) != 0;
  if (elsewhere || segment.roots[root].copies || budget(target) == 0) return;
  const auto source = from.root->files().open(segment.id);
  if (!source) return;
  struct Hot {
    Record put;
    uint64_t used_ns = 0;
  };
  std::vector<Hot> hot;
  const uint64_t now = clock_.wall_ns();
  const auto end =
      scan_extents((*source)->file, segment.id, 0, false, [&](const ExtentHeader& header, uint64_t bytes) {
        const uint64_t used = use_.last(slot, header.offset, now);
        if (used != 0 && !from.replay->is_condemned(slot, header.offset))
          hot.push_back({put_of(header, bytes), used});
      });
  if (!end) return;
  std::ranges::sort(hot, std::greater(), &Hot::used_ns);
  const SegmentInUse source_in_use(segments_, slot);
  std::vector<std::pair<Record, ExtentRef>> carried;
  for (const Hot& extent : hot) {
    const uint64_t bytes = extent.put.where.bytes;
    if (bytes > budget(target)) continue;
    const auto place = target.reserve_beside(bytes);
    if (!place) break;
    const SegmentInUse place_in_use(segments_, place->slot);
    const Status done = carry_extent((*source)->file, extent.put, target, *place, [&stop] { return !stop; });
    if (!done) {
      log(LogLevel::info, "root \"{}\": not rewritten: {}", target.root_path(), done.error().message);
      continue;
    }
    carried.emplace_back(extent.put, place->where);
    ++extents_;
    bytes_ += bytes;
  }
  if (carried.empty()) return;
  // Forgotten by somebody while they were copied: the copies must not outlive them.
  from.replay->poll();
  for (auto& [put, where] : carried) {
    if (!from.replay->is_condemned(slot, put.where.offset)) continue;
    put.where = where;
    target.condemn_extent(put);
  }
}

}  // namespace tokendepot
