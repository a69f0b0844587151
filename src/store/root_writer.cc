#include "store/root_writer.h"

#include <algorithm>
#include <set>

#include "base/errors.h"
#include "base/log.h"
#include "store/scan.h"

namespace tokendepot {
namespace {

constexpr uint32_t kKeeperPatienceMs = 2000;
constexpr uint64_t kTouchIntervalNs = 60ull * 1000 * 1000 * 1000;
constexpr uint64_t kCompactBytes = 4ull << 20;

}  // namespace

RootWriter::RootWriter(Root& root, Replay& replay, SegmentTable& segments, const Clock& clock,
                       uint64_t reserve)
    : root_(root), replay_(replay), segments_(segments), clock_(clock), free_space_reserve_(reserve) {}

RootWriter::~RootWriter() = default;

Result<std::unique_ptr<RootWriter>> RootWriter::open(Root& root, Replay& replay, SegmentTable& segments,
                                                     const Clock& clock, uint64_t free_space_reserve) {
  std::unique_ptr<RootWriter> writer(new RootWriter(root, replay, segments, clock, free_space_reserve));
  if (auto ready = writer->adopt_or_create(); !ready) return std::unexpected(ready.error());
  return writer;
}

Status RootWriter::append(Record record) {
  if (record.time_ns == 0) record.time_ns = clock_.wall_ns();
  {
    std::lock_guard lock(mutex_);
    if (auto written = journal_.append(record); !written) return written;
  }
  replay_.apply(record);
  return {};
}

Status RootWriter::adopt_or_create() {
  for (const uint64_t dead : replay_.writers()) {
    auto locked = JournalWriter::lock(root_.journals_dir() + "/" + journal_name(dead), dead);
    if (!locked || !*locked) continue;  // alive, or not ours to open
    replay_.catch_up(dead);
    journal_ = std::move(**locked);
    if (auto ready = journal_.append_at(replay_.take_over(dead)); !ready) return ready;
    break;
  }
  if (journal_.writer() == 0) {
    auto created = JournalWriter::create(root_.journals_dir());
    if (!created) return std::unexpected(created.error());
    journal_ = std::move(*created);
    replay_.take_over(journal_.writer());
    return {};
  }
  // What the dead writer left: half-filled segments go on, files it never opened become spares.
  const auto entries = list_directory(root_.segments_dir());
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    const auto id = segment_of_name(entry.name);
    if (!id || id->writer != journal_.writer() || !entry.regular) continue;
    next_sequence_ = std::max(next_sequence_, id->sequence + 1);
    const uint32_t slot = segments_.slot_of(*id);
    const SegmentTable::PerRoot state = segments_.get(slot).roots[root_.index()];
    if (state.sealed) continue;
    const bool journaled = state.present && !state.condemned;
    uint64_t used = state.used_bytes;
    if (journaled) {
      const auto end = recover_tail(journal_, *id, used);
      if (!end) {
        log(LogLevel::warning, "root \"{}\": segment {} is left alone: {}", root_.path(), entry.name,
            end.error().message);
        continue;
      }
      used = *end;
    }
    const bool keep = state.condemned ? false : (journaled ? !current_ && used < entry.bytes : !spare_);
    if (!keep) {
      if (journaled) {
        Record seal;
        seal.type = RecordType::seal;
        seal.where = {*id, used, 0};
        if (auto sealed = append(seal); !sealed) return sealed;
      } else if (auto removed = remove_file(root_.segments_dir() + "/" + entry.name); !removed) {
        return removed;
      }
      continue;
    }
    auto file =
        File::open(root_.segments_dir() + "/" + entry.name, {.write = true, .direct = root_.direct()});
    if (!file) return std::unexpected(file.error());
    auto segment = root_.files().adopt(*id, std::move(*file));
    if (!segment) return std::unexpected(segment.error());
    Current taken{slot, *id, std::move(*segment), used, entry.bytes};
    (journaled ? current_ : spare_) = std::move(taken);
  }
  for (const auto& [slot, segment] : segments_.present_segments(root_.index())) {
    if (segment.id.writer == journal_.writer())
      next_sequence_ = std::max(next_sequence_, segment.id.sequence + 1);
  }
  return {};
}

Result<uint64_t> RootWriter::recover_tail(JournalWriter& journal, const SegmentId& id, uint64_t used) {
  auto segment = root_.files().open(id);
  if (!segment) return std::unexpected(segment.error());
  std::vector<Record> found;
  const auto end =
      scan_extents((*segment)->file, id, used, true, [&](const ExtentHeader& header, uint64_t bytes) {
        Record put;
        put.type = RecordType::put;
        put.kind = header.kind;
        put.group = header.group;
        put.key = header.key;
        put.ns_prefix = prefix_of(header.ns);
        put.where = {id, header.offset, bytes};
        put.part = header.part;
        put.tokens = header.tokens;
        put.time_ns = header.stored_at_ns;
        found.push_back(put);
      });
  root_.files().drop(id);  // opened for reading only; the writer opens it again
  if (!end || found.empty()) return end;
  if (auto written = journal.append(found); !written) return std::unexpected(written.error());
  for (const Record& put : found) replay_.apply(put);
  log(LogLevel::info, "root \"{}\": recovered {} extents that {} held without a journal record", root_.path(),
      found.size(), segment_name(id));
  return end;
}

Result<RootWriter::Place> RootWriter::reserve(uint64_t bytes) {
  std::lock_guard lock(mutex_);
  while (!current_ || current_->used + bytes > current_->bytes) {
    if (!spare_)
      return fail(no_space_ ? ErrorKind::no_space : ErrorKind::busy, "root \"{}\": no segment is ready",
                  root_.path());
    if (bytes > spare_->bytes)
      return fail(ErrorKind::no_space, "root \"{}\": segments are smaller than {} bytes", root_.path(),
                  bytes);
    Record records[2];
    size_t count = 0;
    if (current_) {
      records[count].type = RecordType::seal;
      records[count++].where = {current_->id, current_->used, 0};
    }
    records[count].type = RecordType::open_segment;
    records[count++].where = {spare_->id, 0, spare_->bytes};
    for (size_t i = 0; i < count; ++i) records[i].time_ns = clock_.wall_ns();
    if (auto written = journal_.append(std::span(records, count)); !written)
      return std::unexpected(written.error());
    for (size_t i = 0; i < count; ++i) replay_.apply(records[i]);
    current_ = std::move(spare_);
    spare_.reset();
  }
  auto segment = root_.files().open(current_->id);
  if (!segment) return std::unexpected(segment.error());
  Place place{current_->slot, {current_->id, current_->used, bytes}, std::move(*segment)};
  current_->used += bytes;
  return place;
}

Status RootWriter::acknowledge(const Place& place, Record put) {
  put.type = RecordType::put;
  put.where = place.where;
  return append(put);
}

void RootWriter::condemn_extent(Record record) {
  record.type = RecordType::condemn_extent;
  if (auto written = append(record); !written) {
    log(LogLevel::warning, "root \"{}\": {}", root_.path(), written.error().message);
  }
}

void RootWriter::touch(uint32_t slot) {
  const uint64_t now = clock_.wall_ns();
  if (!segments_.touch_due(slot, now, kTouchIntervalNs)) return;
  Record record;
  record.type = RecordType::touch;
  record.where.segment = segments_.id_of(slot);
  record.time_ns = now;
  if (auto written = append(record); !written) {
    log(LogLevel::debug, "root \"{}\": {}", root_.path(), written.error().message);
  }
}

bool RootWriter::wants_spare() const {
  std::lock_guard lock(mutex_);
  return !spare_ || spare_->bytes < root_.segment_bytes();
}

Result<uint64_t> RootWriter::bytes_on_medium() const {
  const auto entries = list_directory(root_.segments_dir());
  if (!entries) return std::unexpected(entries.error());
  uint64_t total = 0;
  for (const DirectoryEntry& entry : *entries) total += entry.bytes;
  return total;
}

Status RootWriter::evict_coldest(const std::function<void(uint32_t)>& before_eviction,
                                 const std::string& recycle_as, uint64_t wanted_bytes, bool* recycled) {
  *recycled = false;
  for (const auto& [slot, segment] : segments_.present_segments(root_.index())) {
    if (!segment.roots[root_.index()].sealed || segment.in_use > 0) continue;
    if (before_eviction) before_eviction(slot);
    Record record;
    record.type = RecordType::condemn_segment;
    record.where.segment = segment.id;
    if (auto written = append(record); !written) return written;
    const std::string path = root_.files().path_of(segment.id);
    const bool fits = segment.roots[root_.index()].file_bytes == wanted_bytes;
    auto gone = fits ? rename_file(path, recycle_as) : remove_file(path);
    if (!gone && gone.error().kind == ErrorKind::not_found) continue;  // another process was faster
    if (!gone) return gone;
    ++evicted_;
    *recycled = fits;
    return {};
  }
  return fail(ErrorKind::no_space, "root \"{}\": nothing can be evicted", root_.path());
}

Result<File> RootWriter::make_file(const std::string& path, uint64_t bytes,
                                   const std::function<void(uint32_t)>& before_eviction) {
  auto keeper = root_.lock_keeper(kKeeperPatienceMs);
  if (!keeper) return std::unexpected(keeper.error());
  if (!*keeper)
    return fail(ErrorKind::busy, "root \"{}\": another process keeps the keeper's lock", root_.path());
  // Each round evicts one segment, so the number of segments bounds the rounds.
  while (true) {
    const auto used = bytes_on_medium();
    if (!used) return std::unexpected(used.error());
    const auto system = file_system_of(root_.path());
    if (!system) return std::unexpected(system.error());
    if (*used + bytes <= root_.capacity() && system->available_bytes >= bytes + free_space_reserve_) {
      auto file =
          File::open(path, {.write = true, .create = true, .exclusive = true, .direct = root_.direct()});
      if (!file) return file;
      const auto allocated = file->preallocate(bytes);
      if (allocated) return file;
      if (auto removed = remove_file(path); !removed) return std::unexpected(removed.error());
      if (allocated.error().kind != ErrorKind::no_space) return std::unexpected(allocated.error());
    }
    bool recycled = false;
    if (auto evicted = evict_coldest(before_eviction, path, bytes, &recycled); !evicted) {
      return std::unexpected(evicted.error());
    }
    if (!recycled) continue;
    auto file = File::open(path, {.write = true, .direct = root_.direct()});
    if (!file) return file;
    const auto size = file->size();
    if (size && *size == bytes) return file;
    if (auto removed = remove_file(path); !removed)
      return std::unexpected(removed.error());  // truncated by somebody
  }
}

Status RootWriter::prepare_spare(const std::function<void(uint32_t)>& before_eviction) {
  SegmentId id;
  std::optional<Current> outgrown;
  {
    std::lock_guard lock(mutex_);
    if (spare_ && spare_->bytes < root_.segment_bytes()) {
      outgrown = std::move(spare_);
      spare_.reset();
    }
    id = {journal_.writer(), next_sequence_++};
  }
  if (outgrown) {
    root_.files().drop(outgrown->id);
    if (auto removed = remove_file(root_.files().path_of(outgrown->id)); !removed) return removed;
    outgrown.reset();
  }
  const uint64_t bytes = root_.segment_bytes();
  auto file = make_file(root_.files().path_of(id), bytes, before_eviction);
  if (!file) {
    // A lock held by another process passes; everything else means that stores cannot wait for space.
    failing_ = no_space_ = file.error().kind != ErrorKind::busy;
    return std::unexpected(file.error());
  }
  failing_ = no_space_ = false;
  auto segment = root_.files().adopt(id, std::move(*file));
  if (!segment) return std::unexpected(segment.error());
  if ((*segment)->mapping.is_mapped()) (*segment)->mapping.populate();
  std::lock_guard lock(mutex_);
  spare_ = Current{segments_.slot_of(id), id, std::move(*segment), 0, bytes};
  return {};
}

uint32_t RootWriter::tend_dead_writers() {
  uint32_t tended = 0;
  for (const uint64_t other : replay_.writers()) {
    std::vector<SegmentTable::Segment> unsealed;
    for (const auto& [slot, segment] : segments_.present_segments(root_.index())) {
      if (segment.id.writer == other && !segment.roots[root_.index()].sealed) unsealed.push_back(segment);
    }
    if (unsealed.empty()) continue;
    auto locked = JournalWriter::lock(root_.journals_dir() + "/" + journal_name(other), other);
    if (!locked || !*locked) continue;
    replay_.catch_up(other);
    if (!(*locked)->append_at(replay_.next_index(other))) continue;
    for (const auto& segment : unsealed) {
      const auto end = recover_tail(**locked, segment.id, segment.roots[root_.index()].used_bytes);
      if (!end) continue;
      Record seal;
      seal.type = RecordType::seal;
      seal.where = {segment.id, *end, 0};
      seal.time_ns = clock_.wall_ns();
      if ((*locked)->append(seal)) replay_.apply(seal);
    }
    ++tended;
  }
  return tended;
}

void RootWriter::remove_orphans() {
  const auto keeper = root_.lock_keeper(0);
  if (!keeper || !*keeper) return;
  replay_.poll();
  const auto entries = list_directory(root_.segments_dir());
  if (!entries) return;
  for (const DirectoryEntry& entry : *entries) {
    if (!entry.regular) continue;
    const std::string path = root_.segments_dir() + "/" + entry.name;
    const auto id = segment_of_name(entry.name);
    if (id) {
      if (id->writer == journal_.writer()) continue;
      const auto slot = segments_.find(*id);
      if (slot && (segments_.present_in(*slot) >> root_.index() & 1u) != 0) continue;
      const bool condemned = slot && segments_.condemned(*slot, root_.index());
      if (condemned) {
        // Whoever condemned it died before it was recycled.
        if (remove_file(path))
          log(LogLevel::info, "root \"{}\": removed the condemned {}", root_.path(), entry.name);
        continue;
      }
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
    if (remove_file(path))
      log(LogLevel::info, "root \"{}\": removed {}, which a dead writer left", root_.path(), entry.name);
  }
}

Result<File> RootWriter::open_copy(const SegmentId& id, uint64_t bytes,
                                   const std::function<void(uint32_t)>& before_eviction) {
  const std::string path = root_.segments_dir() + "/.tmp-" + segment_name(id);
  auto file = make_file(path, bytes, before_eviction);
  if (!file) return file;
  const auto locked = file->try_lock_exclusive();
  if (!locked) return std::unexpected(locked.error());
  if (!*locked) return fail(ErrorKind::busy, "{}: being copied by another process", path);
  return file;
}

Status RootWriter::publish_copy(const SegmentId& id, const File& copy, uint64_t used_bytes) {
  const auto size = copy.size();
  if (!size) return std::unexpected(size.error());
  std::vector<Record> records(1);
  records[0].type = RecordType::adopt_segment;
  records[0].where = {id, 0, *size};
  const auto end = scan_extents(copy, id, 0, false, [&](const ExtentHeader& header, uint64_t bytes) {
    Record& put = records.emplace_back();
    put.kind = header.kind;
    put.group = header.group;
    put.key = header.key;
    put.ns_prefix = prefix_of(header.ns);
    put.where = {id, header.offset, bytes};
    put.part = header.part;
    put.tokens = header.tokens;
    put.time_ns = header.stored_at_ns;
  });
  if (!end) return std::unexpected(end.error());
  Record& seal = records.emplace_back();
  seal.type = RecordType::seal;
  seal.where = {id, used_bytes, 0};
  for (Record& record : records) {
    if (record.time_ns == 0) record.time_ns = clock_.wall_ns();
  }
  if (auto renamed = rename_file(copy.path(), root_.files().path_of(id)); !renamed) return renamed;
  {
    std::lock_guard lock(mutex_);
    if (auto written = journal_.append(records); !written) return written;
  }
  for (const Record& record : records) replay_.apply(record);
  return {};
}

void RootWriter::compact_journal() {
  // Half of the records must be stale for the rewrite to pay; counted in segments, which is what makes
  // records stale.
  std::lock_guard lock(mutex_);
  if (journal_.next_index() * kRecordBytes < kCompactBytes) return;
  auto reader = JournalReader::open(journal_.path(), journal_.writer());
  if (!reader) return;
  std::vector<Record> kept;
  std::set<uint32_t> sealed;
  const auto total = reader->read_new([&](const Record& record) {
    const auto slot = segments_.find(record.where.segment);
    const bool here = slot && (segments_.present_in(*slot) >> root_.index() & 1u) != 0;
    if (!here || record.type == RecordType::touch) return;
    kept.push_back(record);
  });
  if (!total || kept.size() * 2 > *total) return;
  // Segments carry their first writer's id, and a dead writer's half-filled segments are found by it: so none
  // may be open across the change of id.
  if (current_) {
    Record& seal = kept.emplace_back();
    seal.type = RecordType::seal;
    seal.where = {current_->id, current_->used, 0};
    seal.time_ns = clock_.wall_ns();
  }
  auto fresh = JournalWriter::create(root_.journals_dir());
  if (!fresh) return;
  const uint64_t old_writer = journal_.writer();
  if (!fresh->append(kept) || !fresh->sync()) {
    if (auto removed = remove_file(fresh->path()); !removed)
      log(LogLevel::warning, "{}", removed.error().message);
    return;
  }
  if (current_) replay_.apply(kept.back());
  current_.reset();
  if (spare_) {
    const std::string spare_path = root_.files().path_of(spare_->id);
    root_.files().drop(spare_->id);
    spare_.reset();
    if (auto removed = remove_file(spare_path); !removed)
      log(LogLevel::warning, "{}", removed.error().message);
  }
  const std::string old_path = journal_.path();
  journal_ = std::move(*fresh);
  next_sequence_ = 0;
  replay_.take_over(journal_.writer());
  if (auto removed = remove_file(old_path); !removed) log(LogLevel::warning, "{}", removed.error().message);
  log(LogLevel::info, "root \"{}\": journal {} compacted from {} to {} records", root_.path(),
      journal_name(old_writer), *total, kept.size());
}

}  // namespace tokendepot
