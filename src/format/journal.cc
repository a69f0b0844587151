#include "format/journal.h"

#include <algorithm>

#include "base/bytes.h"
#include "base/errors.h"
#include "format/digest.h"
#include "format/extent.h"
#include "format/shape.h"

namespace tokendepot {
namespace {

constexpr uint32_t kMagic = 0x524a4454;  // "TDJR"

constexpr size_t kVersionAt = 4;
constexpr size_t kTypeAt = 6;
constexpr size_t kKindAt = 7;
constexpr size_t kIndexAt = 8;
constexpr size_t kJournalAt = 16;
constexpr size_t kWriterAt = 24;
constexpr size_t kSequenceAt = 32;
constexpr size_t kGroupAt = 36;
constexpr size_t kReserved1At = 38;
constexpr size_t kOffsetAt = 40;
constexpr size_t kBytesAt = 48;
constexpr size_t kNamespaceAt = 56;
constexpr size_t kTimeAt = 64;
constexpr size_t kPartAt = 72;
constexpr size_t kTokensAt = 80;
constexpr size_t kReserved2At = 84;
constexpr size_t kKeyAt = 88;
constexpr size_t kDigestAt = 120;
static_assert(kDigestAt + 8 == kRecordBytes);

// Well-formed values only: a record that proves itself by its digest may still be hostile, and readers
// compute with it.
Status check_record(const Record& record) {
  if (record.type < RecordType::put || record.type > RecordType::adopt_segment) {
    return fail(ErrorKind::corrupt, "journal record {} has type {}, known are 1 to 7", record.index,
                static_cast<unsigned>(record.type));
  }
  if (record.kind != LayoutKind::canonical && record.kind != LayoutKind::opaque) {
    return fail(ErrorKind::corrupt, "journal record {} has layout kind {}, known are 1 and 2", record.index,
                static_cast<unsigned>(record.kind));
  }
  const ExtentRef& where = record.where;
  if (where.offset % kPageBytes != 0 || where.offset > kMaxOffset || where.bytes % kPageBytes != 0 ||
      where.bytes > kMaxOffset) {
    return fail(ErrorKind::corrupt, "journal record {} has offset {} and {} bytes, expected multiples of {}",
                record.index, where.offset, where.bytes, kPageBytes);
  }
  if (record.type != RecordType::put) return {};
  if (where.bytes == 0 || record.tokens < 1 || record.tokens > kMaxTokens ||
      record.part.layer_begin >= record.part.layer_end || record.part.head_begin >= record.part.head_end) {
    return fail(
        ErrorKind::corrupt,
        "journal record {} puts {} bytes of {} tokens, layers {} to {}, heads {} to {}; none may be empty",
        record.index, where.bytes, record.tokens, record.part.layer_begin, record.part.layer_end,
        record.part.head_begin, record.part.head_end);
  }
  return {};
}

}  // namespace

uint64_t prefix_of(const NamespaceDigest& ns) {
  return get_le<uint64_t>(std::as_bytes(std::span(ns.bytes)), 0);
}

Cause cause_of(const Record& condemnation) {
  return condemnation.ns_prefix < kCauseNames.size() ? static_cast<Cause>(condemnation.ns_prefix)
                                                     : Cause::untold;
}

void set_cause(Record& condemnation, Cause cause) {
  condemnation.ns_prefix = static_cast<uint64_t>(cause);
}

void encode_record(const Record& record, std::span<std::byte, kRecordBytes> out) {
  std::ranges::fill(out, std::byte{0});
  put_le<uint32_t>(out, 0, kMagic);
  put_le<uint16_t>(out, kVersionAt, kFormatVersion);
  put_le<uint8_t>(out, kTypeAt, static_cast<uint8_t>(record.type));
  put_le<uint8_t>(out, kKindAt, static_cast<uint8_t>(record.kind));
  put_le<uint64_t>(out, kIndexAt, record.index);
  put_le<uint64_t>(out, kJournalAt, record.journal);
  put_le<uint64_t>(out, kWriterAt, record.where.segment.writer);
  put_le<uint32_t>(out, kSequenceAt, record.where.segment.sequence);
  put_le<uint16_t>(out, kGroupAt, record.group);
  put_le<uint64_t>(out, kOffsetAt, record.where.offset);
  put_le<uint64_t>(out, kBytesAt, record.where.bytes);
  put_le<uint64_t>(out, kNamespaceAt, record.ns_prefix);
  put_le<uint64_t>(out, kTimeAt, record.time_ns);
  put_le<uint16_t>(out, kPartAt, record.part.layer_begin);
  put_le<uint16_t>(out, kPartAt + 2, record.part.layer_end);
  put_le<uint16_t>(out, kPartAt + 4, record.part.head_begin);
  put_le<uint16_t>(out, kPartAt + 6, record.part.head_end);
  put_le<uint32_t>(out, kTokensAt, record.tokens);
  std::memcpy(out.data() + kKeyAt, record.key.bytes.data(), record.key.bytes.size());
  put_le<uint64_t>(out, kDigestAt, xxh3(out.first(kDigestAt)));
}

Result<Record> decode_record(std::span<const std::byte, kRecordBytes> bytes, uint64_t journal,
                             uint64_t index) {
  const std::span<const std::byte> in = bytes;
  if (get_le<uint32_t>(in, 0) != kMagic) {
    return fail(ErrorKind::corrupt, "journal record {} does not start with the record's magic", index);
  }
  const uint64_t stored = get_le<uint64_t>(in, kDigestAt);
  const uint64_t digest = xxh3(in.first(kDigestAt));
  if (stored != digest) {
    return fail(ErrorKind::corrupt, "journal record {} has digest {:016x}, its bytes give {:016x}", index,
                stored, digest);
  }
  if (const uint16_t version = get_le<uint16_t>(in, kVersionAt); version != kFormatVersion) {
    return fail(ErrorKind::unsupported,
                "journal record {} has format version {}, this program reads version {}", index, version,
                kFormatVersion);
  }
  Record record;
  record.type = static_cast<RecordType>(get_le<uint8_t>(in, kTypeAt));
  record.kind = static_cast<LayoutKind>(get_le<uint8_t>(in, kKindAt));
  record.group = get_le<uint16_t>(in, kGroupAt);
  record.index = get_le<uint64_t>(in, kIndexAt);
  record.journal = get_le<uint64_t>(in, kJournalAt);
  if (record.journal != journal || record.index != index) {
    return fail(ErrorKind::corrupt,
                "journal record says journal {:016x} record {}, expected {:016x} record {}", record.journal,
                record.index, journal, index);
  }
  if (get_le<uint16_t>(in, kReserved1At) != 0 || get_le<uint32_t>(in, kReserved2At) != 0) {
    return fail(ErrorKind::corrupt, "journal record {} has reserved bytes that are not zero", index);
  }
  record.where.segment.writer = get_le<uint64_t>(in, kWriterAt);
  record.where.segment.sequence = get_le<uint32_t>(in, kSequenceAt);
  record.where.offset = get_le<uint64_t>(in, kOffsetAt);
  record.where.bytes = get_le<uint64_t>(in, kBytesAt);
  record.ns_prefix = get_le<uint64_t>(in, kNamespaceAt);
  record.time_ns = get_le<uint64_t>(in, kTimeAt);
  record.part.layer_begin = get_le<uint16_t>(in, kPartAt);
  record.part.layer_end = get_le<uint16_t>(in, kPartAt + 2);
  record.part.head_begin = get_le<uint16_t>(in, kPartAt + 4);
  record.part.head_end = get_le<uint16_t>(in, kPartAt + 6);
  record.tokens = get_le<uint32_t>(in, kTokensAt);
  std::memcpy(record.key.bytes.data(), in.data() + kKeyAt, record.key.bytes.size());
  if (Status ok = check_record(record); !ok) return std::unexpected(std::move(ok.error()));
  return record;
}

}  // namespace tokendepot
