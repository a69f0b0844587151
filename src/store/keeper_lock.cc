#include "store/keeper_lock.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <thread>

#include "base/clock.h"
#include "base/errors.h"
#include "base/log.h"

namespace tokendepot {
namespace {

constexpr uint64_t kNsPerMs = 1'000'000;
using StampBytes = std::array<std::byte, kStampBytes>;
using NotesEndBytes = std::array<std::byte, kNotesEndBytes>;

/// Writes it and reads it again: a write that got lost would hide a file from later holders.
Status write_checked(const File& file, std::span<const std::byte> bytes, uint64_t offset) {
  if (auto written = file.write_at(bytes, offset); !written) return written;
  std::vector<std::byte> again(bytes.size());
  if (auto read = file.read_at(again, offset); !read) return read;
  if (std::ranges::equal(again, bytes)) return {};
  return fail(ErrorKind::io, "{} does not keep what is written at {}", file.path(), offset);
}

std::optional<NotesEnd> read_notes_end(const File& file) {
  NotesEndBytes bytes{};
  if (!file.read_at(bytes, kStampBytes)) return std::nullopt;
  return decode_notes_end(bytes);
}

Status write_notes_end(const File& file, const NotesEnd& end) {
  NotesEndBytes bytes{};
  encode_notes_end(end, bytes);
  return write_checked(file, bytes, kStampBytes);
}

}  // namespace

void KeeperLock::renew() {
  ++stamp_.beats;
  StampBytes bytes{};
  encode_stamp(stamp_, bytes);
  // A full disk has no room for it: then this holder may be passed over although it works.
  (void)file_.write_at(bytes, 0);
}

void KeeperLock::keep_notes(const std::optional<NotesEnd>& end, const KeeperStamp& last) {
  uint64_t count = end ? end->count : 0;
  const bool complete = end && end->epoch == last.epoch;
  if (!complete) {
    // By the wall clock, so that nobody takes them for those of a file that was here before.
    count = std::max(count + kNotesKept + 1, system_clock().wall_ns());
    // The space for all of them, now: a disk that is full later can be told of what is removed.
    const std::vector<std::byte> room(kNotesKept * kNoteBytes);
    if (!file_.write_at(room, kNotesAt)) return;
  }
  if (write_notes_end(file_, {count, stamp_.epoch})) noted_ = count;
  others_rely_on_notes_ = complete && !noted_;
}

std::optional<std::vector<Note>> KeeperLock::noted_since(uint64_t seen) const {
  if (!noted_ || seen > *noted_ || *noted_ - seen > kNotesKept) return std::nullopt;
  std::vector<Note> notes;
  std::vector<std::byte> bytes;
  while (seen < *noted_) {
    const uint64_t before_the_wrap = kNotesKept - seen % kNotesKept;
    bytes.resize(std::min(*noted_ - seen, before_the_wrap) * kNoteBytes);
    if (!file_.read_at(bytes, place_of_note(seen))) return std::nullopt;
    for (size_t at = 0; at < bytes.size(); at += kNoteBytes) {
      const auto note = decode_note(seen++, std::span(bytes).subspan(at).first<kNoteBytes>());
      if (!note) return std::nullopt;
      notes.push_back(*note);
    }
  }
  return notes;
}

Status KeeperLock::note(const Note& note) {
  if (others_rely_on_notes_)
    return fail(ErrorKind::io, "{}: the change of a segment file cannot be noted", file_.path());
  if (!noted_) return {};
  std::array<std::byte, kNoteBytes> bytes{};
  encode_note(*noted_, note, bytes);
  if (auto written = write_checked(file_, bytes, place_of_note(*noted_)); !written) return written;
  auto told = write_notes_end(file_, {*noted_ + 1, stamp_.epoch});
  // A host that dies takes with it what it has not sent yet, not the file that it makes next.
  if (told && network_ && note.bytes > 0) told = file_.sync();
  if (told) ++*noted_;
  return told;
}

Result<std::optional<KeeperLock>> KeeperElection::try_once() {
  auto file = File::open(path_, {.write = true, .create = true});
  if (!file) return std::unexpected(file.error());
  const auto locked = file->try_lock_exclusive();
  if (!locked) return std::unexpected(locked.error());
  if (*locked && network_) {
    // GlusterFS keeps small files for a second, until something is written, the kernel what was read between
    // open and lock. With only one of the two nearly every holder read the notes of its own host.
    (void)file->write_at(std::array<std::byte, kUnreadBytes>{}, kUnreadAt);
    file->drop_cached();
  }
  StampBytes bytes{};
  KeeperStamp stamp;
  if (file->read_at(bytes, 0)) stamp = decode_stamp(bytes);
  const uint64_t now = system_clock().steady_ns();
  std::lock_guard lock(mutex_);
  if (*locked) {
    if (!file->is_at_its_path()) return std::optional<KeeperLock>();  // taken over since it was opened
    KeeperLock held;
    held.file_ = std::move(*file);
    held.network_ = network_;
    const auto notes = read_notes_end(held.file_);
    held.stamp_ = {std::max({stamp.epoch, seen_.epoch, notes ? notes->epoch : 0}) + 1, 0};
    held.renew();
    held.keep_notes(notes, stamp);
    seen_since_ns_ = 0;
    return std::optional<KeeperLock>(std::move(held));
  }
  if (seen_since_ns_ == 0 || seen_ != stamp) {
    seen_ = stamp;
    seen_since_ns_ = now;
  } else if (now - seen_since_ns_ > stuck_ms_ * kNsPerMs && file->is_at_its_path()) {
    log(LogLevel::warning, "{}: its holder has not moved for {} s; another process takes over", path_,
        stuck_ms_ / 1000);
    seen_since_ns_ = 0;
    if (auto removed = remove_file(path_); !removed && removed.error().kind != ErrorKind::not_found)
      return std::unexpected(removed.error());
  }
  return std::optional<KeeperLock>();
}

Result<std::optional<KeeperLock>> KeeperElection::acquire(uint32_t patience_ms) {
  constexpr uint32_t kPauseMs = 5;
  for (uint32_t waited = 0;; waited += kPauseMs) {
    auto held = try_once();
    if (!held || *held || waited >= patience_ms) return held;
    std::this_thread::sleep_for(std::chrono::milliseconds(kPauseMs));
  }
}

}  // namespace tokendepot
