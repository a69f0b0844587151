#include "format/keeper_file.h"

#include "base/bytes.h"
#include "format/digest.h"

namespace tokendepot {
namespace {

constexpr size_t kEndDigestAt = kNotesEndBytes - 8;
constexpr size_t kNoteDigestAt = kNoteBytes - 8;

}  // namespace

void encode_stamp(const KeeperStamp& stamp, std::span<std::byte, kStampBytes> out) {
  put_le<uint64_t>(out, 0, stamp.epoch);
  put_le<uint64_t>(out, 8, stamp.beats);
}

KeeperStamp decode_stamp(std::span<const std::byte, kStampBytes> bytes) {
  return {get_le<uint64_t>(bytes, 0), get_le<uint64_t>(bytes, 8)};
}

void encode_notes_end(const NotesEnd& end, std::span<std::byte, kNotesEndBytes> out) {
  put_le<uint64_t>(out, 0, end.count);
  put_le<uint64_t>(out, 8, end.epoch);
  put_le<uint64_t>(out, kEndDigestAt, xxh3(out.first(kEndDigestAt)));
}

std::optional<NotesEnd> decode_notes_end(std::span<const std::byte, kNotesEndBytes> bytes) {
  if (get_le<uint64_t>(bytes, kEndDigestAt) != xxh3(bytes.first(kEndDigestAt))) return std::nullopt;
  return NotesEnd{get_le<uint64_t>(bytes, 0), get_le<uint64_t>(bytes, 8)};
}

void encode_note(uint64_t number, const Note& note, std::span<std::byte, kNoteBytes> out) {
  put_le<uint64_t>(out, 0, number);
  put_le<uint64_t>(out, 8, note.bytes);
  put_le<uint64_t>(out, 16, note.file.segment.writer);
  put_le<uint32_t>(out, 24, note.file.segment.sequence);
  put_le<uint32_t>(out, 28, note.file.copy ? 1 : 0);
  put_le<uint64_t>(out, kNoteDigestAt, xxh3(out.first(kNoteDigestAt)));
}

std::optional<Note> decode_note(uint64_t number, std::span<const std::byte, kNoteBytes> bytes) {
  if (get_le<uint64_t>(bytes, kNoteDigestAt) != xxh3(bytes.first(kNoteDigestAt))) return std::nullopt;
  const uint32_t copy = get_le<uint32_t>(bytes, 28);
  if (get_le<uint64_t>(bytes, 0) != number || copy > 1) return std::nullopt;
  return Note{{{get_le<uint64_t>(bytes, 16), get_le<uint32_t>(bytes, 24)}, copy == 1},
              get_le<uint64_t>(bytes, 8)};
}

}  // namespace tokendepot
