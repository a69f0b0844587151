// What a root's policies take away, between the evictions that make room: segments that have outlived their
// time, and the coldest of namespaces that are over their quota.
#include <algorithm>

#include "base/errors.h"
#include "base/log.h"
#include "store/root_writer.h"
#include "store/scan.h"

namespace tokendepot {

Result<bool> RootWriter::remove_segment(KeeperLock& keeper, uint32_t slot, Cause cause) {
  const SegmentTable::Segment segment = segments_.get(slot);
  const SegmentTable::PerRoot& here = segment.roots[root_.index()];
  if (!here.present || here.condemned || !here.sealed || segment.in_use > 0) return false;
  Record record;
  record.type = RecordType::condemn_segment;
  record.where.segment = segment.id;
  set_cause(record, cause);
  // The record first: a reader that obeys it stops promising what is about to vanish.
  if (auto written = append(record); !written) return std::unexpected(written.error());
  ++evicted_;
  if (condemned_files_.grace_ns() > 0) {
    condemned_files_.add(segment.id, here.file_bytes,
                         {});  // recycled after its grace, or removed as an orphan
    return true;
  }
  auto removed = remove_file(root_.files().path_of(segment.id));
  if (!removed && removed.error().kind != ErrorKind::not_found) return std::unexpected(removed.error());
  inventory_.has_gone(keeper, {segment.id});
  return true;
}

uint64_t RootWriter::condemn_share(uint32_t slot, uint64_t ns_prefix, uint64_t wanted) {
  const SegmentId id = segments_.id_of(slot);
  const auto segment = root_.files().open(id);
  if (!segment) return 0;
  uint64_t condemned = 0;
  const auto end =
      scan_extents((*segment)->file, id, 0, false, [&](const ExtentHeader& header, uint64_t bytes) {
        if (prefix_of(header.ns) != ns_prefix || condemned >= wanted) return;
        if (replay_.is_condemned(slot, header.offset)) return;
        Record record = put_of(header, bytes);
        record.time_ns = 0;  // not of the store: of the condemnation
        condemned += bytes;
        condemn_extent(record, Cause::quota);
      });
  if (!end) log(LogLevel::debug, "root \"{}\": {}", root_.path(), end.error().message);
  return condemned;
}

uint32_t RootWriter::reclaim() {
  const RootPolicies::Verdict first = replay_.policies().verdict();
  if (first.expired.empty() && first.over.empty()) return 0;
  auto keeper = root_.keeper_election().acquire(0);
  if (!keeper || !*keeper) return 0;  // somebody is at it
  KeeperLock& lock = **keeper;
  replay_.poll();  // whoever had the lock before may have removed the same
  replay_.policies().judge(clock_.wall_ns());
  const RootPolicies::Verdict verdict = replay_.policies().verdict();
  uint32_t removed = 0;
  const auto remove = [&](uint32_t slot, Cause cause) {
    lock.renew();
    if (!lock.held()) return false;  // and so is everything after it
    const auto gone = remove_segment(lock, slot, cause);
    if (!gone) log(LogLevel::warning, "root \"{}\": {}", root_.path(), gone.error().message);
    removed += gone && *gone ? 1 : 0;
    return gone && *gone;
  };
  for (const uint32_t slot : verdict.expired) remove(slot, Cause::ttl);

  const auto coldest_first = segments_.present_segments(root_.index());
  for (auto [ns, excess] : verdict.over) {
    for (const bool shared : {false, true}) {
      for (const auto& [slot, segment] : coldest_first) {
        if (excess == 0) break;
        const auto held = verdict.contents.find(slot);
        if (held == verdict.contents.end() || verdict.pinned.contains(slot)) continue;
        const auto of = [over = ns](const auto& tenant) {
          return tenant.ns_prefix == over && tenant.bytes > 0;
        };
        const auto of_others = [over = ns](const auto& tenant) {
          return tenant.ns_prefix != over && tenant.bytes > 0;
        };
        const auto mine = std::ranges::find_if(held->second.tenants, of);
        if (mine == held->second.tenants.end() ||
            std::ranges::any_of(held->second.tenants, of_others) != shared)
          continue;
        uint64_t freed = 0;
        if (shared && segment.roots[root_.index()].sealed) {
          freed = condemn_share(slot, ns, excess);
        } else if (!shared && remove(slot, Cause::quota)) {
          freed = mine->bytes;
        }
        excess -= std::min(excess, freed);
      }
    }
  }
  return removed;
}

}  // namespace tokendepot
