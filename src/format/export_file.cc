#include "format/export_file.h"

#include <algorithm>
#include <string_view>

#include "base/bytes.h"
#include "base/errors.h"
#include "format/digest.h"
#include "format/manifest.h"
#include "format/shape.h"

namespace tokendepot {
namespace {

constexpr std::string_view kMagic = "TDEXPORT";
constexpr size_t kVersionAt = 8;
constexpr size_t kFormatAt = 12;
constexpr size_t kNamespaceAt = 16;
constexpr size_t kManifestBytesAt = 48;
constexpr size_t kCreatedAt = 56;
constexpr size_t kExtentsAt = 64;
constexpr size_t kBytesAt = 72;
constexpr size_t kFieldsEnd = 80;
constexpr size_t kDigestAt = kPageBytes - 8;

constexpr std::string_view kIndexMagic = "TDXINDEX";
constexpr size_t kCountAt = 8;
constexpr size_t kEntriesAt = 16;
constexpr size_t kEntryBytes = 64;
constexpr size_t kTrailerBytes = 16;  // offset of the index, digest

// Of an extent header; format/extent.cc has them all.
constexpr std::string_view kExtentMagic = "TDEXTENT";
constexpr size_t kHeaderBytesAt = 12;
constexpr size_t kHeaderDigestAt = 168;

bool starts_with(std::span<const std::byte> bytes, std::string_view magic) {
  return bytes.size() >= magic.size() && std::memcmp(bytes.data(), magic.data(), magic.size()) == 0;
}

bool all_zero(std::span<const std::byte> bytes) {
  return std::ranges::all_of(bytes, [](std::byte b) { return b == std::byte{0}; });
}

uint64_t digest_of_end(std::span<const std::byte> index_with_offset, uint64_t header_digest) {
  const uint64_t parts[2] = {header_digest, xxh3(index_with_offset)};
  return xxh3(std::as_bytes(std::span(parts)));
}

}  // namespace

void encode_export_header(const ExportHeader& header, std::span<std::byte, kPageBytes> out) {
  std::ranges::fill(out, std::byte{0});
  std::memcpy(out.data(), kMagic.data(), kMagic.size());
  put_le<uint32_t>(out, kVersionAt, kExportVersion);
  put_le<uint32_t>(out, kFormatAt, kFormatVersion);
  std::memcpy(out.data() + kNamespaceAt, header.ns.bytes.data(), header.ns.bytes.size());
  put_le<uint64_t>(out, kManifestBytesAt, header.manifest_bytes);
  put_le<uint64_t>(out, kCreatedAt, header.created_ns);
  put_le<uint64_t>(out, kExtentsAt, header.extents);
  put_le<uint64_t>(out, kBytesAt, header.bytes);
  put_le<uint64_t>(out, kDigestAt, xxh3(out.first(kDigestAt)));
}

Result<ExportHeader> decode_export_header(std::span<const std::byte> page) {
  if (page.size() < kFormatAt + sizeof(uint32_t) || !starts_with(page, kMagic)) {
    return fail(ErrorKind::corrupt, "this is no export file: it does not start with the magic of one");
  }
  const uint32_t version = get_le<uint32_t>(page, kVersionAt);
  const uint32_t format = get_le<uint32_t>(page, kFormatAt);
  if (version != kExportVersion || format != kFormatVersion) {
    return fail(ErrorKind::unsupported,
                "export file has version {} with extents of format version {}, this program reads {} with {}",
                version, format, kExportVersion, kFormatVersion);
  }
  if (page.size() != kPageBytes) {
    return fail(ErrorKind::corrupt, "export file ends after {} bytes, within its first page", page.size());
  }
  const uint64_t stored = get_le<uint64_t>(page, kDigestAt);
  const uint64_t digest = xxh3(page.first(kDigestAt));
  if (stored != digest) {
    return fail(ErrorKind::corrupt, "export file's first page has digest {:016x}, its bytes give {:016x}",
                stored, digest);
  }
  if (!all_zero(page.subspan(kFieldsEnd, kDigestAt - kFieldsEnd))) {
    return fail(ErrorKind::corrupt, "export file's first page has reserved bytes that are not zero");
  }
  ExportHeader header;
  std::memcpy(header.ns.bytes.data(), page.data() + kNamespaceAt, header.ns.bytes.size());
  header.manifest_bytes = get_le<uint64_t>(page, kManifestBytesAt);
  header.created_ns = get_le<uint64_t>(page, kCreatedAt);
  header.extents = get_le<uint64_t>(page, kExtentsAt);
  header.bytes = get_le<uint64_t>(page, kBytesAt);
  if (header.manifest_bytes == 0 || header.manifest_bytes > kMaxManifestBytes) {
    return fail(ErrorKind::corrupt, "export file has a manifest of {} bytes, expected 1 to {}",
                header.manifest_bytes, kMaxManifestBytes);
  }
  return header;
}

uint64_t export_header_digest(std::span<const std::byte, kPageBytes> page) {
  return get_le<uint64_t>(page, kDigestAt);
}

uint64_t extent_header_digest(std::span<const std::byte> header) {
  return get_le<uint64_t>(header, kHeaderDigestAt);
}

std::vector<std::byte> encode_export_index(std::span<const ExportEntry> entries, uint64_t offset,
                                           uint64_t header_digest) {
  TD_CHECK(entries.size() <= kMaxExportedExtents);
  std::vector<std::byte> bytes(kEntriesAt + entries.size() * kEntryBytes + kTrailerBytes);
  const std::span<std::byte> out(bytes);
  std::memcpy(out.data(), kIndexMagic.data(), kIndexMagic.size());
  put_le<uint64_t>(out, kCountAt, entries.size());
  size_t at = kEntriesAt;
  for (const ExportEntry& entry : entries) {
    std::memcpy(out.data() + at, entry.key.bytes.data(), entry.key.bytes.size());
    put_le<uint64_t>(out, at + 32, entry.offset);
    put_le<uint64_t>(out, at + 40, entry.bytes);
    put_le<uint64_t>(out, at + 48, entry.header_digest);
    put_le<uint16_t>(out, at + 56, entry.group);
    at += kEntryBytes;
  }
  put_le<uint64_t>(out, at, offset);
  put_le<uint64_t>(out, at + 8, digest_of_end(out.first(at + 8), header_digest));
  return bytes;
}

Result<std::vector<ExportEntry>> decode_export_index(std::span<const std::byte> bytes, uint64_t offset,
                                                     uint64_t header_digest) {
  if (bytes.size() < kEntriesAt + kTrailerBytes || !starts_with(bytes, kIndexMagic)) {
    return fail(ErrorKind::corrupt, "the index is not whole: {} bytes are there", bytes.size());
  }
  const uint64_t count = get_le<uint64_t>(bytes, kCountAt);
  if (count > kMaxExportedExtents || bytes.size() != kEntriesAt + count * kEntryBytes + kTrailerBytes) {
    return fail(ErrorKind::corrupt, "the index speaks of {} extents in {} bytes", count, bytes.size());
  }
  const size_t trailer = bytes.size() - kTrailerBytes;
  const uint64_t stored = get_le<uint64_t>(bytes, trailer + 8);
  const uint64_t digest = digest_of_end(bytes.first(trailer + 8), header_digest);
  if (stored != digest || get_le<uint64_t>(bytes, trailer) != offset) {
    return fail(ErrorKind::corrupt,
                "the index at {} is not this file's: trailing digest {:016x}, expected {:016x}", offset,
                stored, digest);
  }
  std::vector<ExportEntry> entries(count);
  for (size_t i = 0; i < count; ++i) {
    const auto in = bytes.subspan(kEntriesAt + i * kEntryBytes, kEntryBytes);
    ExportEntry& entry = entries[i];
    std::memcpy(entry.key.bytes.data(), in.data(), entry.key.bytes.size());
    entry.offset = get_le<uint64_t>(in, 32);
    entry.bytes = get_le<uint64_t>(in, 40);
    entry.header_digest = get_le<uint64_t>(in, 48);
    entry.group = get_le<uint16_t>(in, 56);
    if (!all_zero(in.subspan(58))) {
      return fail(ErrorKind::corrupt, "entry {} of the index has reserved bytes that are not zero", i);
    }
  }
  return entries;
}

ExportPiece next_export_piece(std::span<const std::byte> bytes, const NamespaceDigest& ns) {
  ExportPiece piece;
  piece.bytes = std::min<uint64_t>(bytes.size(), kPageBytes);
  if (starts_with(bytes, kIndexMagic)) {
    piece.kind = ExportPiece::Kind::index;
    return piece;
  }
  if (bytes.size() < kPageBytes || !starts_with(bytes, kExtentMagic)) return piece;
  const uint64_t header_bytes = get_le<uint32_t>(bytes, kHeaderBytesAt);
  if (header_bytes % kPageBytes != 0 || header_bytes > extent_header_bytes(kMaxShards)) return piece;
  if (header_bytes > bytes.size()) {
    piece.kind = ExportPiece::Kind::more;
    piece.bytes = header_bytes;
    return piece;
  }
  auto header = decode_extent_header(bytes);
  if (!header || header->ns != ns || extent_bytes(header->shape()) > kMaxExportedExtentBytes) return piece;
  piece.kind = ExportPiece::Kind::extent;
  piece.bytes = extent_bytes(header->shape());
  piece.header = std::move(*header);
  return piece;
}

}  // namespace tokendepot
