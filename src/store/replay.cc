#include "store/replay.h"

#include <algorithm>

#include "base/errors.h"
#include "base/log.h"

namespace tokendepot {
namespace {

constexpr size_t kMostBadPlaces = 1 << 20;

}  // namespace

Replay::Replay(Root& root, SegmentTable& segments, Catalog* catalog)
    : root_(root),
      segments_(segments),
      catalog_(catalog),
      policies_(root.path(), root.index(), root.capacity(), segments, contents_) {}

void Replay::find_journals() {
  const auto entries = list_directory(root_.journals_dir());
  if (!entries) return;
  std::set<uint64_t> listed;
  for (const DirectoryEntry& entry : *entries) {
    const auto writer = writer_of_journal(entry.name);
    if (!writer || !entry.regular) continue;
    listed.insert(*writer);
    if (*writer == own_journal_ || journals_.contains(*writer)) continue;
    auto reader = JournalReader::open(root_.journals_dir() + "/" + entry.name, *writer);
    if (reader) {
      journals_.emplace(*writer, std::move(*reader));
    } else if (reader.error().kind != ErrorKind::not_found) {
      log(LogLevel::warning, "root \"{}\": journal {} is left alone: {}", root_.path(), entry.name,
          reader.error().message);
    }
  }
  // A journal that was compacted away has been read to its end through the open descriptor first.
  for (auto at = journals_.begin(); at != journals_.end();) {
    if (listed.contains(at->first)) {
      ++at;
      continue;
    }
    (void)read(at->second);
    at = journals_.erase(at);
  }
}

Status Replay::read(JournalReader& reader) {
  const uint64_t bad_before = reader.bad_records();
  const auto count = reader.read_new([this](const Record& record) { apply(record); });
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

Status Replay::first() {
  std::lock_guard lock(read_mutex_);
  find_journals();
  for (auto& [writer, reader] : journals_) {
    if (auto whole = read(reader); !whole)
      log(LogLevel::warning, "root \"{}\": {}", root_.path(), whole.error().message);
  }
  // Listed after reading: a record follows the file that it speaks of.
  const auto entries = list_directory(root_.segments_dir());
  if (!entries) {
    if (entries.error().kind == ErrorKind::not_found) return {};  // a read-only root without segments
    return std::unexpected(entries.error());
  }
  std::map<SegmentId, uint64_t> files;
  for (const DirectoryEntry& entry : *entries) {
    const auto id = segment_of_name(entry.name);
    if (id && entry.regular) files.emplace(*id, entry.bytes);
  }
  for (const auto& [slot, segment] : segments_.present_segments(root_.index())) {
    if (const auto file = files.find(segment.id); file != files.end()) {
      segments_.set_present(slot, root_.index(), file->second);
    } else {
      segments_.condemn(slot, root_.index());
      contents_.condemn_segment(slot);
      condemned_ = true;
    }
  }
  counts_evictions_ = true;
  return {};
}

void Replay::poll() {
  std::lock_guard lock(read_mutex_);
  find_journals();
  for (auto& [writer, reader] : journals_) (void)read(reader);
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
}

Result<uint64_t> Replay::catch_up(uint64_t writer) {
  std::lock_guard lock(read_mutex_);
  const auto found = journals_.find(writer);
  if (found == journals_.end())
    return fail(ErrorKind::not_found, "root \"{}\": journal {} is gone", root_.path(), journal_name(writer));
  if (auto whole = read(found->second); !whole) return std::unexpected(whole.error());
  return found->second.next_index();
}

uint32_t Replay::slot_of(const SegmentId& id) {
  // Records of one segment come in runs.
  if (!last_slot_ || last_segment_ != id) {
    last_segment_ = id;
    last_slot_ = segments_.slot_of(id);
  }
  return *last_slot_;
}

std::optional<PartId> Replay::part_of(const Record& record) {
  const PartShape shape{record.group, record.kind, record.part, record.tokens};
  if (!last_part_ || last_shape_ != shape) {
    last_shape_ = shape;
    last_part_ = catalog_->part_id(shape);
  }
  return last_part_;
}

void Replay::apply(const Record& record) {
  std::lock_guard lock(apply_mutex_);
  const uint32_t slot = slot_of(record.where.segment);
  const RootIndex root = root_.index();
  switch (record.type) {
    case RecordType::open_segment:
    case RecordType::adopt_segment:
      if (!segments_.condemned(slot, root)) segments_.set_present(slot, root, record.where.bytes);
      break;
    case RecordType::put:
      if (!segments_.add_extent(slot, root, record.where.offset + record.where.bytes, record.time_ns)) break;
      if (bad_places_.contains({slot, record.where.offset})) break;
      contents_.put(slot, record);
      if (catalog_ == nullptr) break;
      if (const auto part = part_of(record)) catalog_->put(record.key, *part, slot, record.where);
      break;
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
      segments_.condemn(slot, root);
      count_evicted(record, contents_.condemn_segment(slot));
      root_.files().drop(record.where.segment);
      condemned_ = true;
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

bool Replay::is_condemned(uint32_t slot, uint64_t offset) {
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
