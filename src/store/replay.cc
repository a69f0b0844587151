#include "store/replay.h"

#include <algorithm>
#include <utility>

#include "base/clock.h"
#include "base/errors.h"
#include "base/log.h"

namespace tokendepot {
namespace {

constexpr size_t kBatch = 64;
constexpr size_t kAhead = 12;  // records in which a line of memory arrives
constexpr size_t kMostBadPlaces = 1 << 20;
constexpr size_t kMostDisplaced = 1 << 20;
constexpr uint64_t kOutOfOrderNs =
    100'000'000;                          // a writer's threads append in nearly the order of their times
constexpr size_t kMostOpenJournals = 64;  // hundreds of hosts must not use up the descriptors of a process
// Honest journals name few segments that are gone. Forged ones may name any number, of 128 bytes each and
// three times as many in memory: beyond this only segments whose file is there are taken up.
constexpr size_t kSegmentsOnTheirWord = 1 << 16;

}  // namespace

Replay::Replay(Root& root, SegmentTable& segments, Catalog* catalog)
    : root_(root),
      segments_(segments),
      catalog_(catalog),
      bound_(root.capacity()),
      contents_(root.capacity() / (2 * kPageBytes) + IndexBound::kOnTheirWord),
      policies_(root.path(), root.index(), root.capacity(), segments, contents_) {}

std::optional<std::map<uint64_t, uint64_t>> Replay::find_journals() {
  const auto entries = list_directory(root_.journals_dir());
  if (!entries) return std::nullopt;
  std::map<uint64_t, uint64_t> listed;
  for (const DirectoryEntry& entry : *entries) {
    const auto writer = writer_of_journal(entry.name);
    if (!writer || !entry.regular) continue;
    listed.emplace(*writer, entry.bytes);
    if (*writer == own_journal_ || journals_.contains(*writer)) continue;
    auto reader = JournalReader::open(root_.journals_dir() + "/" + entry.name, *writer);
    if (reader) {
      journals_.emplace(*writer, std::move(*reader));
      open_journals_.push_back(*writer);
      bound_open_journals();
    } else if (reader.error().kind != ErrorKind::not_found) {
      log(LogLevel::warning, "root \"{}\": journal {} is left alone: {}", root_.path(), entry.name,
          reader.error().message);
    }
  }
  // A journal that was compacted away is read to its end through the open descriptor first.
  for (auto at = journals_.begin(); at != journals_.end();) {
    if (listed.contains(at->first)) {
      ++at;
      continue;
    }
    if (at->second.is_open()) (void)read(at->second);
    std::erase(open_journals_, at->first);
    at = journals_.erase(at);
  }
  return listed;
}

void Replay::bound_open_journals() {
  while (open_journals_.size() > kMostOpenJournals) {
    if (const auto idle = journals_.find(open_journals_.front()); idle != journals_.end())
      idle->second.close();
    open_journals_.pop_front();
  }
}

Status Replay::read(JournalReader& reader, uint64_t listed_bytes) {
  const uint64_t bad_before = reader.bad_records();
  const bool was_open = reader.is_open();
  const bool tailing = reader.next_index() > 0;
  const auto count = reader.read_new(
      [this, tailing, &reader](const Record& record) {
        // Puts of copies (demoted, promoted, carried on) have the time of their first store.
        const bool fresh = record.time_ns + kOutOfOrderNs >= reader.newest_ns();
        if (tailing && fresh && record.type == RecordType::put) note_lag(record);
        batch_.push_back(record);
        if (batch_.size() < kBatch) return;
        apply(batch_);
        batch_.clear();
      },
      listed_bytes, stop_.get_token());
  apply(batch_);
  batch_.clear();
  if (!was_open && reader.is_open()) {
    open_journals_.push_back(reader.writer());
    bound_open_journals();
  }
  if (count) records_ += *count;
  const uint64_t bad = reader.bad_records() - bad_before;
  if (bad > 0) {
    bad_records_ += bad;
    log(LogLevel::warning, "root \"{}\": journal {} has {} damaged records; what they spoke of is not served",
        root_.path(), journal_name(reader.writer()), bad);
  }
  if (!count) return std::unexpected(count.error());
  return {};
}

void Replay::note_lag(const Record& record) {
  const uint64_t now = system_clock().wall_ns();
  std::lock_guard lock(apply_mutex_);
  lag_.add(now - std::min(now, record.time_ns));  // clocks of other hosts may be ahead
}

LatencyCounts Replay::lag() const {
  std::lock_guard lock(apply_mutex_);
  return lag_;
}

Status Replay::first() {
  std::lock_guard lock(read_mutex_);
  // Before the journals are read: what they say is held against the files that are there.
  const auto entries = list_directory(root_.segments_dir());
  if (!entries && entries.error().kind != ErrorKind::not_found)  // a read-only root may have none
    return std::unexpected(entries.error());
  find_journals();
  {
    std::lock_guard applying(apply_mutex_);
    first_ = true;
    for (const DirectoryEntry& entry : entries ? *entries : std::vector<DirectoryEntry>()) {
      const auto id = segment_of_name(entry.name);
      if (id && entry.regular) listed_.emplace(*id, entry.bytes);
    }
  }
  for (auto& [writer, reader] : journals_) {
    auto whole = read(reader);
    if (!whole && whole.error().kind == ErrorKind::unsupported) return whole;
    if (!whole) log(LogLevel::warning, "root \"{}\": {}", root_.path(), whole.error().message);
  }
  std::map<SegmentId, uint64_t> listed;
  {
    std::lock_guard applying(apply_mutex_);
    first_ = false;
    listed = std::exchange(listed_, {});
  }
  for (const auto& [slot, segment] : segments_.present_segments(root_.index())) {
    std::optional<uint64_t> bytes;
    if (const auto file = listed.find(segment.id); file != listed.end()) {
      bytes = file->second;
    } else {
      bytes = size_on_medium(segment.id);  // a record follows its file: made since they were listed
    }
    if (bytes) {
      segments_.set_present(slot, root_.index(), *bytes);
      std::lock_guard applying(apply_mutex_);
      bound_.found(slot, *bytes);
    } else if (!root_.network()) {  // there a listing may be older than a journal
      std::lock_guard applying(apply_mutex_);
      condemn_segment(slot);
    }
  }
  put_back_displaced();
  counts_evictions_ = true;
  return {};
}

std::optional<uint64_t> Replay::size_on_medium(const SegmentId& id) const {
  const auto file = File::open(root_.files().path_of(id), {});
  const auto size = file ? file->size() : Result<uint64_t>(std::unexpected(file.error()));
  return size ? std::optional(*size) : std::nullopt;
}

void Replay::note_displaced(const Record& record, uint32_t slot, PartId part) {
  const auto before = catalog_->find(record.key, part);
  if (!before || (before->slot == slot && before->offset == record.where.offset)) return;
  if (displaced_.size() < kMostDisplaced)
    displaced_.push_back({record.key, part, before->slot, before->offset, before->bytes});
}

void Replay::put_back_displaced() {
  std::lock_guard lock(apply_mutex_);
  for (const Displaced& copy : std::exchange(displaced_, {})) {
    if (bad_places_.contains({copy.slot, copy.offset}) || !segments_.alive(copy.slot)) continue;
    if (catalog_->find(copy.key, copy.part)) continue;
    const ExtentRef where{segments_.id_of(copy.slot), copy.offset, copy.bytes};
    if (catalog_->put(copy.key, copy.part, copy.slot, where, bound_.has_room(copy.slot)))
      bound_.added(copy.slot);
  }
}

bool Replay::poll() {
  std::lock_guard lock(read_mutex_);
  const auto listed = find_journals();
  if (!listed) return false;
  {
    std::lock_guard applying(apply_mutex_);
    bound_.new_round();
  }
  bool whole = true;
  for (const auto& [writer, bytes] : *listed) {
    const auto reader = journals_.find(writer);
    if (reader == journals_.end()) {
      whole &= writer == own_journal_;
    } else if (!reader->second.has_read(bytes)) {
      whole &= read(reader->second, bytes).has_value();
    }
  }
  return whole;
}

std::vector<uint64_t> Replay::writers() const {
  std::lock_guard lock(read_mutex_);
  std::vector<uint64_t> found;
  for (const auto& [writer, reader] : journals_) found.push_back(writer);
  return found;
}

void Replay::take_over(uint64_t writer) {
  std::lock_guard lock(read_mutex_);
  own_journal_ = writer;
  journals_.erase(writer);
  std::erase(open_journals_, writer);
}

Result<uint64_t> Replay::catch_up(uint64_t writer) {
  std::lock_guard lock(read_mutex_);
  const auto found = journals_.find(writer);
  if (found == journals_.end())
    return fail(ErrorKind::not_found, "root \"{}\": journal {} is gone", root_.path(), journal_name(writer));
  if (auto whole = read(found->second); !whole) return std::unexpected(whole.error());
  return found->second.next_index();
}

std::optional<uint32_t> Replay::slot_of(const SegmentId& id) {
  // Records of one segment come in runs.
  if (!last_slot_ || last_segment_ != id) {
    last_segment_ = id;
    last_slot_ = segments_.find(id);
    if (!last_slot_ && deserves_a_slot(id)) last_slot_ = segments_.slot_of(id);
    if (const auto file = listed_.find(id); last_slot_ && file != listed_.end())
      bound_.found(*last_slot_, file->second);
  }
  return last_slot_;
}

bool Replay::deserves_a_slot(const SegmentId& id) const {
  const size_t known = segments_.size();
  if (known < kSegmentsOnTheirWord) return true;
  return known < SegmentTable::kMost && (listed_.contains(id) || size_on_medium(id));
}

bool Replay::fits(uint32_t slot, const Record& put) {
  const uint64_t end = put.where.offset + put.where.bytes;
  if (!bound_.knows(slot) && segments_.condemned(slot, root_.index())) return true;  // not indexed anyway
  if (bound_.must_ask(slot, end)) {
    if (const auto bytes = size_on_medium(put.where.segment)) bound_.found(slot, *bytes);
  }
  return bound_.fits(slot, end);
}

uint64_t Replay::condemn_segment(uint32_t slot) {
  segments_.condemn(slot, root_.index());
  bound_.condemned(slot);
  condemned_ = true;
  return contents_.condemn_segment(slot);
}

bool Replay::take_condemned() {
  if (!condemned_.exchange(false)) return false;
  std::lock_guard lock(apply_mutex_);
  bound_.swept();
  return true;
}

std::optional<PartId> Replay::part_of(const Record& record) {
  const PartShape shape{record.group, record.kind, record.part, record.tokens};
  if (!last_part_ || last_shape_ != shape) {
    last_shape_ = shape;
    last_part_ = catalog_->part_id(shape);
  }
  return last_part_;
}

void Replay::apply(std::span<const Record> records) {
  std::lock_guard lock(apply_mutex_);
  for (size_t i = 0; i < records.size(); ++i) {
    if (catalog_ != nullptr && i + kAhead < records.size() && records[i + kAhead].type == RecordType::put) {
      if (const auto part = part_of(records[i + kAhead])) catalog_->prefetch(records[i + kAhead].key, *part);
    }
    apply_locked(records[i]);
  }
}

void Replay::apply_locked(const Record& record) {
  const auto known = slot_of(record.where.segment);
  if (!known) return;
  const uint32_t slot = *known;
  const RootIndex root = root_.index();
  switch (record.type) {
    case RecordType::open_segment:
    case RecordType::adopt_segment:
      if (segments_.condemned(slot, root)) break;
      if (record.type == RecordType::open_segment && record.group == kCopiesOnly)
        segments_.mark_copies(slot, root);
      segments_.set_present(slot, root, record.where.bytes);
      break;
    case RecordType::put: {
      if (!fits(slot, record)) break;
      const uint64_t end = record.where.offset + record.where.bytes;
      const bool alive = segments_.add_extent(slot, root, end, record.time_ns);
      const bool served = alive && !bad_places_.contains({slot, record.where.offset});
      if (served) contents_.put(slot, record);
      if (catalog_ == nullptr) break;
      if (!served) {
        catalog_->note_gone(record.key);  // the journal that condemned it was read first
        break;
      }
      if (const auto part = part_of(record)) {
        // Journals are read one after the other, in no order of time: this put may be of a copy that is long
        // gone or condemned, and then the one whose place it takes still counts.
        if (first_) note_displaced(record, slot, *part);
        if (catalog_->put(record.key, *part, slot, record.where, bound_.has_room(slot))) bound_.added(slot);
      }
      break;
    }
    case RecordType::seal:
      segments_.seal(slot, root, record.where.offset);
      break;
    case RecordType::condemn_extent:
      if (bad_places_.contains({slot, record.where.offset})) break;
      if (bad_places_.size() < kMostBadPlaces) bad_places_.insert({slot, record.where.offset});
      count_evicted(record, contents_.condemn_extent(slot, record));
      if (catalog_ == nullptr) break;
      if (const auto part = part_of(record)) catalog_->erase_at(record.key, *part, slot, record.where.offset);
      break;
    case RecordType::condemn_segment:
      count_evicted(record, condemn_segment(slot));
      root_.files().drop(record.where.segment);
      break;
    case RecordType::touch:
      segments_.touch(slot, record.time_ns);
      break;
  }
}

void Replay::count_evicted(const Record& condemnation, uint64_t bytes) {
  if (!counts_evictions_) return;
  const Cause cause = cause_of(condemnation);
  // What other processes do, they count themselves; the command line does not live long enough to.
  if (condemnation.journal != own_journal_ && cause != Cause::manual) return;
  evicted_[static_cast<size_t>(cause)] += bytes;
}

bool Replay::is_condemned(uint32_t slot, uint64_t offset) const {
  std::lock_guard lock(apply_mutex_);
  return bad_places_.contains({slot, offset});
}

EvictedBytes Replay::evicted() const {
  const auto of = [this](Cause cause) { return evicted_[static_cast<size_t>(cause)].load(); };
  return {of(Cause::capacity), of(Cause::quota), of(Cause::ttl), of(Cause::manual), of(Cause::corrupt)};
}

void Replay::tend(const Clock& clock) {
  constexpr uint64_t kRest = 20;  // so that a root of very many segments takes little of a core
  std::lock_guard lock(tend_mutex_);
  if (policies_.read()) {
    mark_pinned();
    tend_again_ns_ = 0;
  }
  const uint64_t began = clock.steady_ns();
  if (began < tend_again_ns_) return;
  policies_.judge(clock.wall_ns());
  tend_again_ns_ = began + kRest * (clock.steady_ns() - began);
}

void Replay::mark_pinned() {
  // Which key lies where is kept nowhere but in the journals, and pins change rarely.
  const auto entries = list_directory(root_.journals_dir());
  if (!entries) return;
  for (const DirectoryEntry& entry : *entries) {
    const auto writer = writer_of_journal(entry.name);
    if (!writer || !entry.regular) continue;
    auto reader = JournalReader::open(root_.journals_dir() + "/" + entry.name, *writer);
    if (!reader) continue;
    (void)reader->read_new([this](const Record& record) {
      if (record.type != RecordType::put) return;
      std::lock_guard lock(apply_mutex_);
      const auto slot = segments_.find(record.where.segment);
      if (slot && !bad_places_.contains({*slot, record.where.offset})) contents_.mark(*slot, record);
    });
  }
}

}  // namespace tokendepot
