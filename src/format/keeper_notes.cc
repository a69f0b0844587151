#include "format/keeper_notes.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "base/bytes.h"
#include "base/errors.h"
#include "format/digest.h"

namespace tokendepot {
namespace {

constexpr std::string_view kMagic = "TDKEEPER";
constexpr uint32_t kVersion = 1;
constexpr size_t kVersionAt = 8;
constexpr size_t kSequenceAt = 12;
constexpr size_t kWriterAt = 16;
constexpr size_t kCapacityAt = 24;
constexpr size_t kBeganAt = 32;
constexpr size_t kBytesAt = 40;
constexpr size_t kBadAt = 48;
constexpr size_t kFinishedAt = 56;
constexpr size_t kFinishedBytesAt = 64;
constexpr size_t kFinishedBadAt = 72;
constexpr size_t kReservedAt = 80;
constexpr size_t kDigestAt = kKeeperNotesBytes - 8;

}  // namespace

void encode_keeper_notes(const KeeperNotes& notes, std::span<std::byte, kKeeperNotesBytes> out) {
  std::ranges::fill(out, std::byte{0});
  std::memcpy(out.data(), kMagic.data(), kMagic.size());
  put_le<uint32_t>(out, kVersionAt, kVersion);
  put_le<uint32_t>(out, kSequenceAt, notes.scrub_next.sequence);
  put_le<uint64_t>(out, kWriterAt, notes.scrub_next.writer);
  put_le<uint64_t>(out, kCapacityAt, notes.capacity_bytes);
  put_le<uint64_t>(out, kBeganAt, notes.scrub_began_ns);
  put_le<uint64_t>(out, kBytesAt, notes.scrub_bytes);
  put_le<uint64_t>(out, kBadAt, notes.scrub_bad);
  put_le<uint64_t>(out, kFinishedAt, notes.finished_ns);
  put_le<uint64_t>(out, kFinishedBytesAt, notes.finished_bytes);
  put_le<uint64_t>(out, kFinishedBadAt, notes.finished_bad);
  put_le<uint64_t>(out, kDigestAt, xxh3(out.first(kDigestAt)));
}

Result<KeeperNotes> decode_keeper_notes(std::span<const std::byte> bytes) {
  if (bytes.size() < kSequenceAt || std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return fail(ErrorKind::corrupt, "keeper's notes of {} bytes do not start with their magic", bytes.size());
  }
  if (const uint32_t version = get_le<uint32_t>(bytes, kVersionAt); version != kVersion) {
    return fail(ErrorKind::unsupported, "keeper's notes have version {}, this program reads version {}",
                version, kVersion);
  }
  if (bytes.size() != kKeeperNotesBytes) {
    return fail(ErrorKind::corrupt, "keeper's notes have {} bytes, expected {}", bytes.size(),
                kKeeperNotesBytes);
  }
  const uint64_t stored = get_le<uint64_t>(bytes, kDigestAt);
  const uint64_t digest = xxh3(bytes.first(kDigestAt));
  if (stored != digest) {
    return fail(ErrorKind::corrupt, "keeper's notes have digest {:016x}, their bytes give {:016x}", stored,
                digest);
  }
  if (!std::ranges::all_of(bytes.subspan(kReservedAt, kDigestAt - kReservedAt),
                           [](std::byte b) { return b == std::byte{0}; })) {
    return fail(ErrorKind::corrupt, "keeper's notes have reserved bytes that are not zero");
  }
  KeeperNotes notes;
  notes.scrub_next = {get_le<uint64_t>(bytes, kWriterAt), get_le<uint32_t>(bytes, kSequenceAt)};
  notes.capacity_bytes = get_le<uint64_t>(bytes, kCapacityAt);
  notes.scrub_began_ns = get_le<uint64_t>(bytes, kBeganAt);
  notes.scrub_bytes = get_le<uint64_t>(bytes, kBytesAt);
  notes.scrub_bad = get_le<uint64_t>(bytes, kBadAt);
  notes.finished_ns = get_le<uint64_t>(bytes, kFinishedAt);
  notes.finished_bytes = get_le<uint64_t>(bytes, kFinishedBytesAt);
  notes.finished_bad = get_le<uint64_t>(bytes, kFinishedBadAt);
  return notes;
}

}  // namespace tokendepot
