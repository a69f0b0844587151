// Any bytes as the end of a keeper's notes and as a note, as they are and with their digests made right.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "format/digest.h"
#include "format/keeper_file.h"

namespace {

template <size_t N>
using Bytes = std::array<std::byte, N>;

template <size_t N>
Bytes<N> with_digest(Bytes<N> bytes) {
  const uint64_t digest = tokendepot::xxh3(std::span(bytes).first(N - 8));
  std::memcpy(bytes.data() + N - 8, &digest, sizeof digest);
  return bytes;
}

void decode_end(const Bytes<tokendepot::kNotesEndBytes>& bytes) {
  const auto end = tokendepot::decode_notes_end(bytes);
  if (!end) return;
  Bytes<tokendepot::kNotesEndBytes> again;
  tokendepot::encode_notes_end(*end, again);
  TD_CHECK(again == bytes);
}

void decode(const Bytes<tokendepot::kNoteBytes>& bytes) {
  uint64_t number = 0;
  std::memcpy(&number, bytes.data(), sizeof number);
  TD_CHECK(!tokendepot::decode_note(number + 1, bytes));
  const auto note = tokendepot::decode_note(number, bytes);
  if (!note) return;
  Bytes<tokendepot::kNoteBytes> again;
  tokendepot::encode_note(number, *note, again);
  TD_CHECK(again == bytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  Bytes<tokendepot::kNotesEndBytes> end{};
  Bytes<tokendepot::kNoteBytes> note{};
  std::memcpy(end.data(), data, std::min(size, end.size()));
  std::memcpy(note.data(), data, std::min(size, note.size()));
  decode_end(end);
  decode_end(with_digest(end));
  decode(note);
  decode(with_digest(note));
  return 0;
}
