// What dead writers leave in a root: tails of segments that no journal speaks of, segments that are not
// sealed, files that nobody owns.
#include "base/errors.h"
#include "base/log.h"
#include "store/root_writer.h"

namespace tokendepot {
namespace {

constexpr size_t kRecoveredAtOnce = 4096;  // records; a forged segment may hold any number of extents

}  // namespace

Result<uint64_t> RootWriter::recover_tail(JournalWriter& journal, const SegmentId& id, uint64_t used,
                                          ScanBudget& budget) {
  auto segment = root_.files().open(id);
  if (!segment) return std::unexpected(segment.error());
  std::vector<Record> found;
  uint64_t recovered = 0;
  Status written;
  const auto make_known = [&] {
    if (written) written = journal.append(found);
    if (!written) return;
    for (const Record& put : found) replay_.apply(put);
    recovered += found.size();
    found.clear();
  };
  const auto end = scan_extents((*segment)->file, id, used, true,
                                [&](const ExtentHeader& header, uint64_t bytes) {
                                  if (!written) return;
                                  found.push_back(put_of(header, bytes));
                                  if (found.size() == kRecoveredAtOnce) make_known();
                                },
                                kScanPatience, &budget);
  root_.files().drop(id);  // opened for reading only; the writer opens it again
  if (!end) return end;
  if (!found.empty()) make_known();
  if (!written) return std::unexpected(written.error());
  if (recovered > 0)
    log(LogLevel::info, "root \"{}\": recovered {} extents that {} held without a journal record",
        root_.path(), recovered, segment_name(id));
  return end;
}

uint32_t RootWriter::tend_dead_writers() {
  uint32_t tended = 0;
  std::map<uint64_t, std::vector<uint32_t>> unsealed;
  for (const auto& [slot, segment] : segments_.present_segments(root_.index())) {
    if (!segment.roots[root_.index()].sealed) unsealed[segment.id.writer].push_back(slot);
  }
  unsealed.erase(writer_id());
  for (const uint64_t other : replay_.writers()) {
    const auto found = unsealed.extract(other);
    if (!found || !is_abandoned(other)) continue;
    auto locked = JournalWriter::lock(root_.journals_dir() + "/" + journal_name(other), other);
    if (!locked || !*locked) continue;
    const auto next_index = replay_.catch_up(other);
    if (!next_index || !(*locked)->append_at(*next_index)) continue;
    ScanBudget budget;
    for (const uint32_t slot : found.mapped()) {
      const SegmentTable::Segment segment = segments_.get(slot);
      if (segment.roots[root_.index()].sealed || segment.roots[root_.index()].condemned) continue;
      const auto end = recover_tail(**locked, segment.id, segment.roots[root_.index()].used_bytes, budget);
      if (!end) continue;
      Record seal;
      seal.type = RecordType::seal;
      seal.where = {segment.id, *end, 0};
      seal.time_ns = clock_.wall_ns();
      if ((*locked)->append(seal)) replay_.apply(seal);
    }
    ++tended;
  }
  // What is left has no journal of its own here, so nobody adds to it: a copy whose seal was lost.
  for (const auto& [writer, slots] : unsealed) {
    for (const uint32_t slot : slots) {
      const SegmentTable::Segment segment = segments_.get(slot);
      // Or one that stores of a living process pass through to.
      const auto copy = File::open(root_.files().path_of(segment.id), {});
      const auto locked = copy ? copy->is_locked_by_another() : Result<bool>(false);
      if (!locked || *locked) continue;
      Record seal;
      seal.type = RecordType::seal;
      seal.where = {segment.id, segment.roots[root_.index()].used_bytes, 0};
      if (!append(seal)) return tended;
    }
  }
  return tended;
}

void RootWriter::remove_orphans() {
  auto keeper = root_.keeper_election().acquire(0);
  if (!keeper || !*keeper) return;
  // A segment that only an unread journal speaks of looks like nobody's.
  if (!replay_.poll()) return;
  const uint64_t own = writer_id();
  const auto entries = inventory_.list(**keeper);
  if (!entries) return;
  condemned_files_.see(inventory_, segments_, root_.index());
  for (const DirectoryEntry& entry : *entries) {
    if (!entry.regular) continue;
    const std::string path = root_.segments_dir() + "/" + entry.name;
    const auto id = segment_of_name(entry.name);
    if (id) {
      const auto slot = segments_.find(*id);
      if (slot && (segments_.present_in(*slot) >> root_.index() & 1u) != 0) continue;
      const bool condemned = slot && segments_.condemned(*slot, root_.index());
      if (condemned) {
        // Whoever condemned it died before it was recycled, or nobody has wanted its space.
        if (!condemned_files_.may_go(*id) || !remove_file(path)) continue;
        inventory_.has_gone(**keeper, {*id});
        log(LogLevel::info, "root \"{}\": removed the condemned {}", root_.path(), entry.name);
        continue;
      }
      if (id->writer == own || !is_abandoned(id->writer)) continue;
      auto owner = JournalWriter::lock(root_.journals_dir() + "/" + journal_name(id->writer), id->writer);
      if (owner && !*owner) continue;  // a live writer's spare
      if (!owner && owner.error().kind != ErrorKind::not_found) continue;
    } else {
      if (!entry.name.starts_with(".tmp-")) continue;  // foreign: left alone
      auto copy = File::open(path, {.write = true});
      if (!copy) continue;
      const auto locked = copy->try_lock_exclusive();
      if (!locked || !*locked) continue;  // being copied by a live process
    }
    if (!remove_file(path)) continue;
    if (const auto file = segment_file_of_name(entry.name)) inventory_.has_gone(**keeper, *file);
    log(LogLevel::info, "root \"{}\": removed {}, which a dead writer left", root_.path(), entry.name);
  }
}

void RootWriter::remove_unfinished() {
  if (unfinished_ && unfinished_->empty()) return;
  // Nobody locks such a file, and clocks of hosts differ. But it is written in milliseconds, under a random
  // name: what is there at two calls has no writer any more.
  std::set<std::string> found;
  for (const std::string& directory : {root_.path(), root_.manifests_dir()}) {
    const auto entries = list_directory(directory);
    if (!entries) return;
    for (const DirectoryEntry& entry : *entries) {
      if (entry.regular && entry.name.starts_with(".tmp-")) found.insert(directory + "/" + entry.name);
    }
  }
  if (!unfinished_) {
    unfinished_ = std::move(found);
    return;
  }
  for (const std::string& path : *unfinished_) {
    if (found.contains(path) && remove_file(path))
      log(LogLevel::info, "removed {}, which a dead process had begun to write", path);
  }
  unfinished_->clear();
}

}  // namespace tokendepot
