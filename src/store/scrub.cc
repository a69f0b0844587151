#include "store/scrub.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>
#include <utility>

#include "base/errors.h"
#include "base/log.h"
#include "format/keeper_notes.h"
#include "io/io_thread.h"
#include "store/extent_check.h"
#include "store/scan.h"

namespace tokendepot {
namespace {

constexpr uint64_t kSecondNs = 1'000'000'000;
constexpr uint64_t kBetweenPassesNs = 24ull * 3600 * kSecondNs;  // from one's end to the next one's begin
constexpr uint64_t kNotesEveryNs = 10 * kSecondNs;
constexpr uint64_t kLongestBurstNs = kSecondNs / 4;
// Journals are read once for so many segments: little memory, and little reading beside the payload's.
constexpr size_t kSegmentsAtOnce = 64;

/// What the journals of a root say lies in these segments and is not condemned, by place.
Result<std::map<SegmentId, std::vector<StoredExtent>>> extents_of(const std::string& root_path,
                                                                  const std::set<SegmentId>& segments) {
  std::map<SegmentId, std::map<uint64_t, StoredExtent>> found;
  std::set<std::pair<SegmentId, uint64_t>> condemned;
  const std::string directory = root_path + "/journals";
  const auto entries = list_directory(directory);
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    const auto writer = writer_of_journal(entry.name);
    if (!writer || !entry.regular) continue;
    auto reader = JournalReader::open(directory + "/" + entry.name, *writer);
    if (!reader) continue;
    const auto read = reader->read_new([&](const Record& r) {
      if (!segments.contains(r.where.segment)) return;
      if (r.type == RecordType::condemn_extent) condemned.emplace(r.where.segment, r.where.offset);
      if (r.type != RecordType::put) return;
      found[r.where.segment][r.where.offset] = extent_of(r);
    });
    if (!read) return std::unexpected(read.error());
  }
  std::map<SegmentId, std::vector<StoredExtent>> live;
  for (auto& [id, by_offset] : found) {
    for (const auto& [offset, extent] : by_offset) {
      if (!condemned.contains({id, offset})) live[id].push_back(extent);
    }
    drop_overlapping(live[id]);
  }
  return live;
}

}  // namespace

struct Scrubber::Place {
  explicit Place(RootWriter& at) : writer(at) {}
  RootWriter& writer;
  std::optional<File> lock;
  KeeperNotes notes;
  bool notes_are_ours = true;  // false: another version's; left alone
  uint64_t noted_ns = 0;       // steady clock
  uint64_t paid_until_ns = 0;  // steady clock: when the bytes read so far have been paid for
  std::atomic<uint64_t> scrubbed = 0;
  std::atomic<uint64_t> errors = 0;
  std::atomic<uint64_t> pass_bytes = 0;
  std::atomic<uint64_t> finished_ns = 0;
};

Scrubber::Scrubber(const std::vector<RootWriter*>& writers, SegmentTable& segments, const Clock& clock,
                   uint64_t bytes_per_second)
    : segments_(segments), clock_(clock), bytes_per_second_(bytes_per_second) {
  for (RootWriter* writer : writers) places_.push_back(std::make_unique<Place>(*writer));
  if (bytes_per_second_ == 0 || places_.empty()) return;
  std::lock_guard lock(mutex_);
  thread_ = start_io_thread(
      [](void* self) {
        auto* const scrubber = static_cast<Scrubber*>(self);
        scrubber->run();
        scrubber->end_thread();
      },
      this, "td-scrub");
  at_work_ = thread_.joinable();
}

void Scrubber::end_thread() {
  std::lock_guard lock(mutex_);
  at_work_ = false;
  ended_.notify_all();
}

bool Scrubber::stop(std::chrono::nanoseconds patience) {
  std::unique_lock lock(mutex_);
  stop_ = true;
  wake_.notify_all();
  return ended_.wait_for(lock, patience, [this] { return !at_work_; });
}

Scrubber::~Scrubber() {
  (void)stop(std::chrono::nanoseconds(0));
  if (thread_.joinable()) thread_.join();
}

Scrubber::Progress Scrubber::progress(RootIndex root) const {
  for (const auto& place : places_) {
    if (place->writer.root().index() == root)
      return {place->scrubbed, place->errors, place->pass_bytes, place->finished_ns};
  }
  return {};
}

bool Scrubber::sleep(uint64_t ns) {
  std::unique_lock lock(mutex_);
  return !wake_.wait_for(lock, std::chrono::nanoseconds(ns), [this] { return stop_; });
}

bool Scrubber::may_read(Place& place, uint64_t bytes) {
  // A step aside for what the engine waits for; not for ever, else a busy engine's root is never scrubbed.
  constexpr uint64_t kStepNs = kSecondNs / 50;
  for (uint64_t waited = 0; waited < kSecondNs && segments_.in_motion() > 0; waited += kStepNs) {
    if (!sleep(kStepNs)) return false;
  }
  const uint64_t now = clock_.steady_ns();
  place.paid_until_ns = std::max(place.paid_until_ns, now);
  const uint64_t ahead = place.paid_until_ns - now;
  if (!sleep(ahead > kLongestBurstNs ? ahead - kLongestBurstNs : 0)) return false;
  place.paid_until_ns +=
      static_cast<uint64_t>(static_cast<double>(bytes) * 1e9 / static_cast<double>(bytes_per_second_));
  place.scrubbed += bytes;
  place.notes.scrub_bytes += bytes;
  place.pass_bytes = place.notes.scrub_bytes;
  return true;
}

void Scrubber::note(Place& place) {
  place.noted_ns = clock_.steady_ns();
  if (!place.notes_are_ours) return;
  place.notes.capacity_bytes = place.writer.root().capacity();
  std::array<std::byte, kKeeperNotesBytes> bytes;
  encode_keeper_notes(place.notes, bytes);
  if (auto written = write_file_atomically(place.writer.root().path() + "/keeper-notes", bytes); !written)
    log(LogLevel::debug, "{}", written.error().message);
}

bool Scrubber::begin_or_go_on(Place& place) {
  const std::string& path = place.writer.root().path();
  if (!place.lock) {
    auto file = File::open(path + "/scrub.lock", {.write = true, .create = true});
    if (!file) return false;
    const auto locked = file->try_lock_exclusive();
    const auto bytes = read_file(path + "/keeper-notes", kKeeperNotesBytes);
    auto notes = bytes ? decode_keeper_notes(*bytes) : Result<KeeperNotes>(KeeperNotes{});
    if (notes) {
      place.notes = *notes;
    } else if (notes.error().kind != ErrorKind::unsupported) {
      log(LogLevel::warning, "root \"{}\": the scrub starts over: {}", path, notes.error().message);
    }
    place.notes_are_ours = notes || notes.error().kind != ErrorKind::unsupported;
    place.pass_bytes = place.notes.scrub_began_ns != 0 ? place.notes.scrub_bytes : 0;
    place.finished_ns = place.notes.finished_ns;
    if (!locked || !*locked) return false;  // another process scrubs; its notes are shown
    place.lock = std::move(*file);
    note(place);  // the capacity, for tools that ask the root
  }
  const uint64_t now = clock_.wall_ns();
  KeeperNotes& notes = place.notes;
  // A begin that lies ahead was written by a clock that was wrong.
  const bool stale = notes.scrub_began_ns > now;
  if (notes.scrub_began_ns != 0 && !stale) return true;
  const uint64_t last = std::min(notes.finished_ns, now);
  if (!stale && last != 0 && now - last < kBetweenPassesNs) return false;
  notes.scrub_next = {};
  notes.scrub_began_ns = now;
  notes.scrub_bytes = notes.scrub_bad = 0;
  return true;
}

void Scrubber::check_segment(Place& place, const SegmentId& id, const std::vector<StoredExtent>& extents) {
  const auto slot = segments_.find(id);
  if (!slot) return;
  const Root& root = place.writer.root();
  const RootIndex index = root.index();
  const std::string path = root.files().path_of(id);
  auto file = File::open(path, {.direct = root.direct()});
  if (!file && file.error().kind == ErrorKind::unsupported) file = File::open(path, {});
  const auto bytes = file ? credible_bytes(*file) : Result<uint64_t>(std::unexpected(file.error()));
  if (!bytes) return;  // gone; or not readable, which loads tell
  for (const StoredExtent& extent : extents) {
    if (segments_.condemned(*slot, index)) break;
    const auto good = check_extent(*file, *bytes, extent, fmt::format("{} at {}", path, extent.where.offset),
                                   [&](uint64_t wanted) { return may_read(place, wanted); });
    if (good) continue;
    if (good.error().kind == ErrorKind::closed) break;
    // A segment that was recycled while it was read has another name by now: its bytes were not ours to
    // judge.
    if (segments_.condemned(*slot, index) || !file->is_at_its_path()) break;
    ++place.errors;
    log(LogLevel::warning, "root \"{}\": scrub: {}", root.path(), good.error().message);
    // That they cannot be read proves nothing against the bytes, nor does anything on a network file system,
    // where those of another host may come later than its journal.
    if (good.error().kind == ErrorKind::io || root.network()) continue;
    ++place.notes.scrub_bad;
    place.writer.condemn_extent(record_of(extent));
  }
}

void Scrubber::step(Place& place) {
  if (!begin_or_go_on(place)) return;
  const RootIndex index = place.writer.root().index();
  std::vector<SegmentId> ids;
  for (const auto& [slot, segment] : segments_.present_segments(index)) {
    if (segment.roots[index].sealed && segment.id >= place.notes.scrub_next) ids.push_back(segment.id);
  }
  std::ranges::sort(ids);
  const bool last = ids.size() <= kSegmentsAtOnce;
  ids.resize(std::min(ids.size(), kSegmentsAtOnce));
  const auto extents = extents_of(place.writer.root().path(), std::set<SegmentId>(ids.begin(), ids.end()));
  if (!extents) return;
  for (const SegmentId& id : ids) {
    if (const auto found = extents->find(id); found != extents->end())
      check_segment(place, id, found->second);
    if (!sleep(0)) return note(place);
    place.notes.scrub_next = {id.writer, id.sequence + 1};
    if (clock_.steady_ns() - place.noted_ns >= kNotesEveryNs) note(place);
  }
  if (!last) return note(place);
  KeeperNotes& notes = place.notes;
  notes.finished_ns = clock_.wall_ns();
  notes.finished_bytes = notes.scrub_bytes;
  notes.finished_bad = notes.scrub_bad;
  notes.scrub_began_ns = notes.scrub_bytes = notes.scrub_bad = 0;
  notes.scrub_next = {};
  place.finished_ns = notes.finished_ns;
  place.pass_bytes = 0;
  note(place);
}

void Scrubber::run() {
  // The first look comes after the start's own reading; then a root without work costs a lock a second.
  while (sleep(kSecondNs)) {
    for (const auto& place : places_) step(*place);
  }
}

}  // namespace tokendepot
