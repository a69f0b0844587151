#include "store/root_writer.h"

#include <algorithm>

#include "base/errors.h"
#include "base/log.h"

namespace tokendepot {
namespace {

constexpr uint32_t kKeeperPatienceMs = 2000;
constexpr uint64_t kCompactBytes = 4ull << 20;

}  // namespace

RootWriter::RootWriter(Root& root, Replay& replay, SegmentTable& segments, const Clock& clock,
                       uint64_t reserve, uint64_t eviction_grace_ns)
    : root_(root),
      replay_(replay),
      segments_(segments),
      clock_(clock),
      free_space_reserve_(reserve),
      inventory_(root.segments_dir(), clock),
      condemned_files_(clock, eviction_grace_ns) {}

RootWriter::~RootWriter() = default;

Record RootWriter::seal_of(const Current& segment) const {
  Record seal;
  seal.type = RecordType::seal;
  seal.where = {segment.id, segment.used, 0};
  seal.time_ns = clock_.wall_ns();
  return seal;
}

Result<std::unique_ptr<RootWriter>> RootWriter::open(Root& root, Replay& replay, SegmentTable& segments,
                                                     const Clock& clock, uint64_t free_space_reserve,
                                                     uint64_t eviction_grace_ns) {
  std::unique_ptr<RootWriter> writer(
      new RootWriter(root, replay, segments, clock, free_space_reserve, eviction_grace_ns));
  if (auto ready = writer->adopt_or_create(); !ready) return std::unexpected(ready.error());
  writer->confirmed_ns_ = clock.steady_ns();
  return writer;
}

Status RootWriter::append(Record record) {
  if (record.time_ns == 0) record.time_ns = clock_.wall_ns();
  {
    std::lock_guard lock(mutex_);
    if (auto written = append_locked(std::span(&record, 1)); !written) return written;
  }
  replay_.apply(record);
  return {};
}

Status RootWriter::append_locked(std::span<Record> records) {
  if (!holds_journal_locked())
    return fail(ErrorKind::busy, "root \"{}\": its file system has not confirmed the journal's lock for {} s",
                root_.path(), kHoldNs / 1'000'000'000);
  auto written = journal_.append(records);
  if (written) written_bytes_ += records.size() * kRecordBytes;
  if (!written && written.error().kind == ErrorKind::no_space) cramped_ = true;
  return written;
}

Status RootWriter::adopt_or_create() {
  for (const uint64_t dead : replay_.writers()) {
    auto locked = JournalWriter::lock(root_.journals_dir() + "/" + journal_name(dead), dead);
    if (!locked || !*locked) continue;  // alive, or not ours to open
    const auto end = replay_.catch_up(dead);
    if (!end) continue;
    if (auto ready = (*locked)->append_at(*end); !ready) return ready;
    use_journal(std::move(**locked));
    replay_.take_over(dead);
    break;
  }
  if (journal_.writer() == 0) {
    auto created = JournalWriter::create(root_.journals_dir());
    if (!created) return std::unexpected(created.error());
    use_journal(std::move(*created));
    replay_.take_over(journal_.writer());
    return {};
  }
  // What the dead writer left: half-filled segments go on, files it never opened become spares.
  const auto entries = list_directory(root_.segments_dir());
  if (!entries) return std::unexpected(entries.error());
  ScanBudget budget;
  for (const DirectoryEntry& entry : *entries) {
    const auto id = segment_of_name(entry.name);
    if (!id || id->writer != journal_.writer() || !entry.regular) continue;
    next_sequence_ = std::max(next_sequence_, id->sequence + 1);
    const uint32_t slot = segments_.slot_of(*id);
    const SegmentTable::PerRoot state = segments_.get(slot).roots[root_.index()];
    // Condemned ones have their grace, whoever condemned them.
    if (state.sealed || state.condemned) continue;
    const bool journaled = state.present;
    uint64_t used = state.used_bytes;
    if (journaled) {
      const auto end = recover_tail(journal_, *id, used, budget);
      if (!end) {
        log(LogLevel::warning, "root \"{}\": segment {} is left alone: {}", root_.path(), entry.name,
            end.error().message);
        continue;
      }
      used = *end;
    }
    // Over a network "dead" may mean cut off: a segment into which its owner may still write is not filled
    // up.
    // Nor one whose copy in the next root may be sealed already, nor one that is larger than any of this
    // root.
    const bool fill = !root_.network() && !root_.write_through() && !state.copies && !current_ &&
                      used < entry.bytes && entry.bytes <= root_.capacity() / 3;
    const bool keep = journaled ? fill : !spare_;
    if (!keep) {
      if (journaled) {
        Record seal;
        seal.type = RecordType::seal;
        seal.where = {*id, used, 0};
        if (auto sealed = append(seal); !sealed) return sealed;
      } else if (auto removed = remove_unused(*id);
                 !removed && removed.error().kind != ErrorKind::not_found) {
        return removed;
      }
      continue;
    }
    auto file =
        File::open(root_.segments_dir() + "/" + entry.name, {.write = true, .direct = root_.direct()});
    if (!file && file.error().kind == ErrorKind::not_found) {  // somebody removed it since it was listed
      Record gone;
      gone.type = RecordType::condemn_segment;
      gone.where.segment = *id;
      if (auto condemned = append(gone); !condemned) return condemned;
      continue;
    }
    if (!file) return std::unexpected(file.error());
    auto segment = root_.files().adopt(*id, std::move(*file));
    if (!segment) return std::unexpected(segment.error());
    Current taken{slot, *id, std::move(*segment), used, entry.bytes};
    (journaled ? current_ : spare_) = std::move(taken);
  }
  next_sequence_ = std::max(next_sequence_, segments_.next_sequence(journal_.writer()));
  return {};
}

Result<RootWriter::Place> RootWriter::reserve(uint64_t bytes) {
  std::lock_guard lock(mutex_);
  if (!holds_journal_locked())
    return fail(ErrorKind::busy, "root \"{}\": waiting for its file system", root_.path());
  // Somebody took the file away (a tool, a damaged journal): it may be another segment by now.
  if (current_ && segments_.condemned(current_->slot, root_.index())) current_.reset();
  while (!current_ || current_->used + bytes > current_->bytes) {
    if (!spare_)
      return fail(no_space_ ? ErrorKind::no_space : ErrorKind::busy, "root \"{}\": no segment is ready",
                  root_.path());
    if (bytes > spare_->bytes) {
      // The keeper replaces a spare that extents have outgrown.
      const bool grows = bytes <= root_.segment_bytes();
      return fail(grows ? ErrorKind::busy : ErrorKind::no_space,
                  "root \"{}\": segments are smaller than {} bytes", root_.path(), bytes);
    }
    Record records[2];
    size_t count = 0;
    if (current_) records[count++] = seal_of(*current_);
    records[count].type = RecordType::open_segment;
    records[count++].where = {spare_->id, 0, spare_->bytes};
    {
      const std::lock_guard known(known_mutex_);
      known_spare_ = {};  // counted as a segment from here on
    }
    for (size_t i = 0; i < count; ++i) records[i].time_ns = clock_.wall_ns();
    if (auto written = append_locked(std::span(records, count)); !written)
      return std::unexpected(written.error());
    for (size_t i = 0; i < count; ++i) replay_.apply(records[i]);
    current_ = std::move(spare_);
    spare_.reset();
  }
  stored_bytes_ += bytes;
  return cut_locked(*current_, bytes);
}

SegmentId RootWriter::next_id_locked() {
  return {journal_.writer(), next_sequence_++};
}

RootWriter::Place RootWriter::cut_locked(Current& segment, uint64_t bytes) {
  Place place{segment.slot, {segment.id, segment.used, bytes}, root_.files().share(segment.segment), hold_};
  segment.used += bytes;
  return place;
}

Result<RootWriter::Place> RootWriter::reserve_beside(uint64_t bytes) {
  std::lock_guard lock(mutex_);
  if (!current_ || segments_.condemned(current_->slot, root_.index()) ||
      current_->used + bytes > current_->bytes)
    return fail(ErrorKind::busy, "root \"{}\": no room beside what is stored", root_.path());
  return cut_locked(*current_, bytes);
}

Result<RootWriter::Place> RootWriter::reserve_copy(uint64_t bytes, const BeforeEviction& before_eviction) {
  SegmentId id;
  {
    std::lock_guard lock(mutex_);
    if (copies_ &&
        (segments_.condemned(copies_->slot, root_.index()) || copies_->segment->file.was_removed()))
      copies_.reset();
    if (copies_ && copies_->used + bytes <= copies_->bytes) return cut_locked(*copies_, bytes);
    id = next_id_locked();
  }
  const uint64_t file_bytes = std::max(root_.segment_bytes(), bytes);
  auto segment = make_segment(id, file_bytes, before_eviction);
  if (!segment) return std::unexpected(segment.error());
  std::lock_guard lock(mutex_);
  if (auto ours = still_ours_locked(id); !ours) return std::unexpected(ours.error());
  std::vector<Record> records;
  if (copies_) records.push_back(seal_of(*copies_));
  Record& open = records.emplace_back();
  open.type = RecordType::open_segment;
  open.group = kCopiesOnly;
  open.where = {id, 0, file_bytes};
  for (Record& record : records) record.time_ns = clock_.wall_ns();
  if (auto written = append_locked(records); !written) {
    root_.files().drop(id);
    (void)remove_unused(id);
    return std::unexpected(written.error());
  }
  for (const Record& record : records) replay_.apply(record);
  copies_ = Current{segments_.slot_of(id), id, std::move(*segment), 0, file_bytes};
  return cut_locked(*copies_, bytes);
}

Status RootWriter::acknowledge(const Place& place, Record put) {
  put.type = RecordType::put;
  put.where = place.where;
  if (put.time_ns == 0) put.time_ns = clock_.wall_ns();
  {
    std::lock_guard lock(mutex_);
    if (place.hold != hold_)
      return fail(ErrorKind::closed, "root \"{}\": {} is another process's by now", root_.path(),
                  segment_name(place.where.segment));
    if (auto written = append_locked(std::span(&put, 1)); !written) return written;
  }
  replay_.apply(put);
  return {};
}

void RootWriter::condemn_extent(Record record, Cause cause) {
  tell_condemned(condemn_here(record, cause));
}

Record RootWriter::condemn_here(Record record, Cause cause) {
  record.type = RecordType::condemn_extent;
  set_cause(record, cause);
  record.time_ns = clock_.wall_ns();
  record.journal = writer_id_;  // evictions are counted by whose they are
  replay_.apply(record);
  return record;
}

void RootWriter::tell_condemned(Record record) {
  std::lock_guard lock(mutex_);
  if (auto written = append_locked(std::span(&record, 1)); !written) {
    log(LogLevel::warning, "root \"{}\": {}", root_.path(), written.error().message);
  }
}

void RootWriter::touch(uint32_t slot) {
  Record record;
  record.type = RecordType::touch;
  record.where.segment = segments_.id_of(slot);
  record.time_ns = clock_.wall_ns();
  if (auto written = append(record); !written) {
    log(LogLevel::debug, "root \"{}\": {}", root_.path(), written.error().message);
  }
}

void RootWriter::use_journal(JournalWriter journal) {
  journal_ = std::move(journal);
  writer_id_ = journal_.writer();
}

RootWriter::Spare RootWriter::spare() const {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  const std::lock_guard known(known_mutex_);
  if (lock) known_spare_ = spare_ ? Spare{spare_->id, spare_->bytes} : Spare{};
  return known_spare_;
}

bool RootWriter::wants_spare() const {
  std::lock_guard lock(mutex_);
  return !spare_ || spare_->bytes < root_.largest_extent_bytes() || cramped_;
}

Result<KeeperLock> RootWriter::lock_keeper() {
  auto keeper = root_.keeper_election().acquire(kKeeperPatienceMs);
  if (!keeper) return std::unexpected(keeper.error());
  if (!*keeper)
    return fail(ErrorKind::busy, "root \"{}\": another process keeps the keeper's lock", root_.path());
  return std::move(**keeper);
}

Status RootWriter::still_keeper(const KeeperLock& keeper) const {
  if (keeper.held()) return {};
  return fail(ErrorKind::busy, "root \"{}\": another process has taken over as keeper", root_.path());
}

Result<SegmentLease> RootWriter::make_segment(const SegmentId& id, uint64_t bytes,
                                              const BeforeEviction& before_eviction) {
  SegmentMapping kept;
  bool populated = false;
  auto made = [&]() -> Result<SegmentLease> {
    auto keeper = lock_keeper();
    if (!keeper) return std::unexpected(keeper.error());
    auto file = make_file(*keeper, {id}, bytes, before_eviction, &kept);
    if (!file) return std::unexpected(file.error());
    populated = kept.is_mapped();
    auto adopted = root_.files().adopt(id, std::move(*file), std::move(kept));
    // Left behind, it would take up capacity until the next start.
    if (!adopted && remove_file(root_.files().path_of(id))) inventory_.has_gone(*keeper, {id});
    return adopted;
  }();
  if (made && (*made)->mapping.is_mapped() && !populated) (*made)->mapping.populate();
  return made;
}

Status RootWriter::remove_unused(const SegmentId& id) {
  auto removed = remove_file(root_.files().path_of(id));
  inventory_.may_have_gone({id});
  return removed;
}

Status RootWriter::still_ours_locked(const SegmentId& id) {
  if (id.writer == journal_.writer()) return {};
  // The journal was compacted meanwhile: nobody would find this segment by its name after a crash.
  root_.files().drop(id);
  if (auto removed = remove_unused(id); !removed) return removed;
  return fail(ErrorKind::busy, "root \"{}\": the journal changed its name", root_.path());
}

Status RootWriter::prepare_spare(const BeforeEviction& before_eviction) {
  if (cramped_) {
    // Others have filled the file system, and without a journal no segment is worth anything: one goes for
    // it.
    auto keeper = lock_keeper();
    if (!keeper) return std::unexpected(keeper.error());
    auto leaving = take_condemned(0, true);
    if (!leaving) {
      auto evicted = evict_coldest(*keeper, before_eviction);
      failing_ = no_space_ = !evicted;
      if (!evicted) return evicted;
      leaving = take_condemned(0, true);
    }
    if (leaving) {
      if (auto gone = remove_file(root_.files().path_of(leaving->id));
          !gone && gone.error().kind != ErrorKind::not_found)
        return gone;
      inventory_.has_gone(*keeper, {leaving->id});
    }
    failing_ = no_space_ = false;
    cramped_ = false;
  }
  SegmentId id;
  std::optional<Current> outgrown;
  {
    std::lock_guard lock(mutex_);
    if (spare_ && spare_->bytes >= root_.largest_extent_bytes()) return {};
    if (spare_) {
      outgrown = std::move(spare_);
      spare_.reset();
    }
    id = next_id_locked();
  }
  if (outgrown) {
    root_.files().drop(outgrown->id);
    if (auto removed = remove_unused(outgrown->id); !removed) return removed;
    outgrown.reset();
  }
  const uint64_t bytes = root_.segment_bytes();
  auto segment = make_segment(id, bytes, before_eviction);
  // A lock held by another process passes soon; for everything else stores cannot wait: neither for space
  // that does not come nor for the end of a grace.
  failing_ = !segment && segment.error().kind != ErrorKind::busy;
  no_space_ = failing_ || (!segment && condemned_files_.bytes() > 0);
  if (!segment) return std::unexpected(segment.error());
  std::lock_guard lock(mutex_);
  if (auto ours = still_ours_locked(id); !ours) return ours;
  spare_ = Current{segments_.slot_of(id), id, std::move(*segment), 0, bytes};
  return {};
}

void RootWriter::leave_spoilt_segments() {
  SegmentLease spare;
  SegmentLease current;
  uint64_t spare_bytes = 0;
  uint64_t current_bytes = 0;
  {
    std::lock_guard lock(mutex_);
    if (spare_) {
      spare = root_.files().share(spare_->segment);
      spare_bytes = spare_->bytes;
    }
    if (current_ && !segments_.condemned(current_->slot, root_.index())) {
      current = root_.files().share(current_->segment);
      current_bytes = current_->bytes;
    }
  }
  // Outside of the lock, which stores need: a file system may take long to answer.
  const auto is_cut = [](const File& file, uint64_t bytes) {
    const auto size = file.size();
    return size && *size < bytes;
  };
  if (spare && (spare->file.was_removed() || is_cut(spare->file, spare_bytes))) drop_spare(spare->id);
  if (!current) return;
  if (current->file.was_removed()) return leave_removed(current->id);
  if (is_cut(current->file, current_bytes)) leave_cut(current->id);
}

void RootWriter::drop_spare(const SegmentId& id) {
  {
    std::lock_guard lock(mutex_);
    if (!spare_ || spare_->id != id) return;
    spare_.reset();
  }
  root_.files().drop(id);
  inventory_.may_have_gone({id});
  if (auto removed = remove_unused(id); !removed && removed.error().kind != ErrorKind::not_found)
    log(LogLevel::warning, "{}", removed.error().message);
}

void RootWriter::leave_removed(const SegmentId& id) {
  log(LogLevel::warning, "root \"{}\": {} was removed while it was filled; what it held is not served",
      root_.path(), segment_name(id));
  inventory_.may_have_gone({id});
  Record record;
  record.type = RecordType::condemn_segment;  // reserve() goes on with the next one
  record.where.segment = id;
  if (auto written = append(record); !written)
    log(LogLevel::warning, "root \"{}\": {}", root_.path(), written.error().message);
}

void RootWriter::leave_cut(const SegmentId& id) {
  std::lock_guard lock(mutex_);
  if (!current_ || current_->id != id) return;
  log(LogLevel::warning,
      "root \"{}\": {} was cut short while it was filled; what lay behind its end is not served",
      root_.path(), segment_name(id));
  Record seal = seal_of(*current_);
  seal.time_ns = clock_.wall_ns();
  if (auto written = append_locked(std::span(&seal, 1)); !written) {
    log(LogLevel::warning, "root \"{}\": {}", root_.path(), written.error().message);
    return;
  }
  replay_.apply(seal);
  current_.reset();
}

void RootWriter::compact_journal() {
  // Half of the records must be stale for the rewrite to pay; counted in segments, which is what makes
  // records stale.
  std::lock_guard lock(mutex_);
  if (journal_.next_index() * kRecordBytes < kCompactBytes) return;
  auto reader = JournalReader::open(journal_.path(), journal_.writer());
  if (!reader) return;
  std::vector<Record> kept;
  const auto total = reader->read_new([&](const Record& record) {
    const auto slot = segments_.find(record.where.segment);
    const bool here = slot && (segments_.present_in(*slot) >> root_.index() & 1u) != 0;
    // Whose file is still there must not look like one that no journal speaks of.
    const bool going =
        record.type == RecordType::condemn_segment && condemned_files_.contains(record.where.segment);
    if (going) kept.push_back(record);
    if (!here || record.type == RecordType::touch) return;
    kept.push_back(record);
  });
  if (!total || kept.size() * 2 > *total) return;
  // Segments carry their first writer's id, and a dead writer's half-filled segments are found by it: so none
  // may be open across the change of id.
  const size_t open_ones = kept.size();
  if (current_) kept.push_back(seal_of(*current_));
  if (copies_) kept.push_back(seal_of(*copies_));
  auto fresh = JournalWriter::create(root_.journals_dir());
  if (!fresh) return;
  const uint64_t old_writer = journal_.writer();
  if (!fresh->append(kept) || !fresh->sync()) {
    if (auto removed = remove_file(fresh->path()); !removed)
      log(LogLevel::warning, "{}", removed.error().message);
    return;
  }
  for (size_t i = open_ones; i < kept.size(); ++i) replay_.apply(kept[i]);
  current_.reset();
  copies_.reset();
  if (spare_) {
    const SegmentId spare = spare_->id;
    root_.files().drop(spare);
    spare_.reset();
    if (auto removed = remove_unused(spare); !removed) log(LogLevel::warning, "{}", removed.error().message);
  }
  // Removed while it is still locked: nobody may take it for a dead writer's and append to it.
  if (auto removed = remove_file(journal_.path()); !removed)
    log(LogLevel::warning, "{}", removed.error().message);
  use_journal(std::move(*fresh));
  next_sequence_ = 0;
  replay_.take_over(journal_.writer());
  log(LogLevel::info, "root \"{}\": journal {} compacted from {} to {} records", root_.path(),
      journal_name(old_writer), *total, kept.size());
}

}  // namespace tokendepot
