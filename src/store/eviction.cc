// Where the file of the next segment comes from: free room, or the coldest segments, which are condemned
// first and give their files when their grace is over.
#include <algorithm>
#include <utility>

#include "base/errors.h"
#include "store/root_writer.h"

namespace tokendepot {
namespace {

constexpr int kMostBusy = 4;  // candidates that may not go yet, each asked for with patience

}  // namespace

Status RootWriter::evict_coldest(KeeperLock& keeper, const BeforeEviction& before_eviction) {
  RootPolicies& policies = replay_.policies();
  bool pinned = false;
  const auto candidates =
      policies.victims(segments_.present_segments(root_.index()), clock_.wall_ns(), &pinned);
  pinned_ = pinned;
  int busy = 0;
  for (const auto& [slot, segment] : candidates) {
    if (!segment.roots[root_.index()].sealed || segment.in_use > 0) continue;
    keeper.renew();
    if (before_eviction) {
      auto may_go = before_eviction(slot);
      if (!may_go && (may_go.error().kind == ErrorKind::closed || ++busy == kMostBusy)) return may_go;
      if (!may_go) continue;
    }
    if (auto still = still_keeper(keeper); !still) return still;
    const SegmentTable::Segment now = segments_.get(slot);
    if (now.in_use > 0 || now.roots[root_.index()].condemned) continue;
    // Before the record, which makes this process close the file.
    SegmentMapping mapping = root_.files().take_mapping(segment.id);
    Record record;
    record.type = RecordType::condemn_segment;
    record.where.segment = segment.id;
    set_cause(record, policies.is_over_quota(slot) ? Cause::quota : Cause::capacity);
    auto written = append(record);
    if (!written && written.error().kind == ErrorKind::no_space) {
      // The file system is so full that not even the record fits: then the file goes first.
      if (auto gone = remove_file(root_.files().path_of(segment.id));
          !gone && gone.error().kind != ErrorKind::not_found)
        return gone;
      inventory_.has_gone(keeper, {segment.id});
      written = append(record);
      mapping = {};
    }
    if (!written) return written;
    condemned_files_.add(segment.id, segment.roots[root_.index()].file_bytes, std::move(mapping));
    ++evicted_;
    return {};
  }
  if (busy > 0)
    return fail(ErrorKind::busy, "root \"{}\": what could be evicted is being copied to the next root",
                root_.path());
  return fail(ErrorKind::no_space, "root \"{}\": nothing can be evicted", root_.path());
}

uint64_t RootWriter::bytes_to_condemn(uint64_t wanted) const {
  if (condemned_files_.grace_ns() == 0) return wanted;
  const uint64_t begun = inventory_.bytes_begun_within(condemned_files_.grace_ns());
  return std::max(wanted, std::min(2 * begun, root_.capacity() / 4));
}

void RootWriter::condemn_ahead(KeeperLock& keeper, uint64_t used, uint64_t bytes,
                               const BeforeEviction& before_eviction) {
  if (condemned_files_.grace_ns() == 0) return;
  const uint64_t wanted = bytes_to_condemn(bytes);
  const uint64_t room = root_.capacity() - std::min(root_.capacity(), used);
  const auto can_go = [this](const auto& entry) { return entry.second.roots[root_.index()].sealed; };
  while (room + condemned_files_.bytes() < wanted) {
    // The last one that can go is served until its space is really wanted.
    if (std::ranges::count_if(segments_.present_segments(root_.index()), can_go) < 2) return;
    if (!evict_coldest(keeper, before_eviction)) return;
  }
}

std::optional<CondemnedFiles::Leaving> RootWriter::take_condemned(uint64_t wanted_bytes, bool at_once) {
  return condemned_files_.take(wanted_bytes, at_once, [this](const SegmentId& id) {
    const auto slot = segments_.find(id);
    return slot && segments_.get(*slot).in_use > 0;
  });
}

Result<File> RootWriter::make_file(KeeperLock& keeper, const SegmentFileName& name, uint64_t bytes,
                                   const BeforeEviction& before_eviction, SegmentMapping* kept) {
  const std::string path = inventory_.path_of(name);
  if (auto known = inventory_.catch_up(keeper); !known) return std::unexpected(known.error());
  // Each round condemns or removes one segment, so the number of segments bounds the rounds.
  while (true) {
    keeper.renew();
    condemned_files_.see(inventory_, segments_, root_.index());
    const uint64_t used = inventory_.bytes();
    const bool capacity_is_short = bytes > root_.capacity() || used > root_.capacity() - bytes;
    // A full root takes what may go without asking its file system, which costs a round trip where it is
    // shared.
    auto leaving = capacity_is_short ? take_condemned(bytes, false) : std::nullopt;
    uint64_t available = 0;
    bool medium_is_short = false;
    if (!leaving) {
      const auto system = file_system_of(root_.path());
      if (!system) return std::unexpected(system.error());
      available = system->available_bytes;
      medium_is_short = bytes > available || free_space_reserve_ > available - bytes;
    }
    if (!capacity_is_short && !medium_is_short) {
      if (auto told = inventory_.will_be(keeper, name, bytes); !told) return std::unexpected(told.error());
      auto file =
          File::open(path, {.write = true, .create = true, .exclusive = true, .direct = root_.direct()});
      if (!file) {
        inventory_.may_have_gone(name);
        return file;
      }
      const auto allocated = file->preallocate(bytes);
      if (allocated) {
        condemn_ahead(keeper, used + bytes, bytes, before_eviction);
        return file;
      }
      if (auto removed = remove_file(path); !removed) return std::unexpected(removed.error());
      inventory_.has_gone(keeper, name);
      if (allocated.error().kind != ErrorKind::no_space) return std::unexpected(allocated.error());
      medium_is_short = true;
    }
    // Others have filled the medium: that waits for no grace.
    if (!leaving && medium_is_short) leaving = take_condemned(bytes, true);
    if (!leaving) {
      const uint64_t waiting = condemned_files_.bytes();
      if (waiting < bytes_to_condemn(bytes)) {
        auto evicted = evict_coldest(keeper, before_eviction);
        if (evicted) continue;
        if (evicted.error().kind != ErrorKind::no_space) return std::unexpected(evicted.error());
      }
      if (waiting > 0)
        return fail(ErrorKind::busy,
                    "root \"{}\": the segments that go are kept for a moment: what was promised of "
                    "them is still to be loaded",
                    root_.path());
      if (inventory_.list_again(keeper)) continue;  // somebody may have made room by hand
      return fail(
          ErrorKind::no_space,
          "root \"{}\": nothing can be evicted and a new segment of {} bytes would exceed capacity={} or "
          "leave less than free_space_reserve={} on its file system, or of the process's memory limit where "
          "that "
          "is memory",
          root_.path(), bytes, root_.capacity(), free_space_reserve_);
    }
    const std::string old_path = root_.files().path_of(leaving->id);
    const bool fits = leaving->bytes == bytes;
    if (fits) {
      if (auto told = inventory_.will_be(keeper, name, bytes); !told) return std::unexpected(told.error());
    }
    auto gone = fits ? rename_file(old_path, path) : remove_file(old_path);
    if (fits && !gone) inventory_.has_gone(keeper, name);
    if (!gone && gone.error().kind != ErrorKind::not_found) return std::unexpected(gone.error());
    inventory_.has_gone(keeper, {leaving->id});
    // A listing of a network file system may go on showing what another process has taken.
    if (!gone && capacity_is_short)
      return fail(ErrorKind::busy, "root \"{}\": another process was faster", root_.path());
    if (!gone || !fits) {
      if (capacity_is_short) continue;
      // Whoever has the file open or mapped keeps its space for a while; to go on would evict the whole root.
      const auto now = file_system_of(root_.path());
      if (now && now->available_bytes <= available) {
        return fail(ErrorKind::busy, "root \"{}\": the space of an evicted segment is not free yet",
                    root_.path());
      }
      continue;
    }
    auto file = File::open(path, {.write = true, .direct = root_.direct()});
    if (!file) return file;
    const auto size = file->size();
    if (size && *size == bytes) {
      if (kept != nullptr) *kept = std::move(leaving->mapping);
      condemn_ahead(keeper, used, bytes, before_eviction);
      return file;
    }
    if (auto removed = remove_file(path); !removed)
      return std::unexpected(removed.error());  // truncated by somebody
    inventory_.has_gone(keeper, name);
  }
}

}  // namespace tokendepot
