// The bytes of keeper.lock: who keeps the root, and what its keepers have changed in its segments directory.
//
// The changes are a ring of notes, so that whoever becomes keeper learns what came and went since it was the
// last time without listing the directory. A note only saves a listing: what is damaged, missing or from a
// program that keeps no notes means "list", and a file that is noted and not there costs its space until the
// next listing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "tokendepot/plan.h"

namespace tokendepot {

struct KeeperStamp {
  uint64_t epoch = 0;  // one more with each holder
  uint64_t beats = 0;
  bool operator==(const KeeperStamp&) const = default;
};

/// How far the notes go, and the epoch of the holder that wrote this: of another epoch than the stamp it was
/// not kept up by the last holder.
struct NotesEnd {
  uint64_t count = 0;
  uint64_t epoch = 0;
};

/// A segment file, or the copy of one that is being made.
struct SegmentFileName {
  SegmentId segment;
  bool copy = false;  // .tmp-<name of the segment>
  auto operator<=>(const SegmentFileName&) const = default;
};

struct Note {
  SegmentFileName file;
  uint64_t bytes = 0;  // from now on; 0 = the file is gone
};

inline constexpr size_t kStampBytes = 16;
inline constexpr size_t kNotesEndBytes = 24;  // behind the stamp
/// Written before the rest is read, and never read itself.
inline constexpr uint64_t kUnreadAt = kStampBytes + kNotesEndBytes;
inline constexpr size_t kUnreadBytes = 8;
inline constexpr size_t kNoteBytes = 40;
inline constexpr uint64_t kNotesAt = 4096;
inline constexpr uint64_t kNotesKept = 1024;

/// Where the note of this number lies in the file.
constexpr uint64_t place_of_note(uint64_t number) {
  return kNotesAt + number % kNotesKept * kNoteBytes;
}

void encode_stamp(const KeeperStamp& stamp, std::span<std::byte, kStampBytes> out);
KeeperStamp decode_stamp(std::span<const std::byte, kStampBytes> bytes);
void encode_notes_end(const NotesEnd& end, std::span<std::byte, kNotesEndBytes> out);
/// nullopt for anything that is not one.
std::optional<NotesEnd> decode_notes_end(std::span<const std::byte, kNotesEndBytes> bytes);
void encode_note(uint64_t number, const Note& note, std::span<std::byte, kNoteBytes> out);
/// nullopt for anything but the note of this number.
std::optional<Note> decode_note(uint64_t number, std::span<const std::byte, kNoteBytes> bytes);

}  // namespace tokendepot
