// A file that carries a namespace, or one prompt's prefix of it, to another site: what its bytes mean. Pure
// functions; docs/format.md, "Export file".
//
// Effect of damage: a header or manifest that is not right makes the file unusable; an extent that is not
// right costs that extent; an index or a trailing digest that is not right or not there says that something
// is missing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "format/extent.h"
#include "tokendepot/error.h"
#include "tokendepot/key.h"
#include "tokendepot/layout.h"

namespace tokendepot {

inline constexpr uint32_t kExportVersion = 1;
inline constexpr uint64_t kMaxExportedExtents = 1ull << 24;
/// Header and payload; both ends hold one extent in memory.
inline constexpr uint64_t kMaxExportedExtentBytes = 1ull << 30;

struct ExportHeader {
  NamespaceDigest ns;
  uint64_t manifest_bytes = 0;  // the manifest follows, filled up to whole pages with zeros
  uint64_t created_ns = 0;      // wall clock, information only
  uint64_t extents = 0;         // as planned, for progress; the index has what is in the file
  uint64_t bytes = 0;           // of these extents
  bool operator==(const ExportHeader&) const = default;
};

void encode_export_header(const ExportHeader& header, std::span<std::byte, kPageBytes> out);
/// `corrupt` for anything that is not an export file's first page, `unsupported` (naming both versions) for
/// another version of this file or of its extents.
Result<ExportHeader> decode_export_header(std::span<const std::byte> page);
/// What a decoded first page is known by in the trailing digest: its last 8 bytes.
uint64_t export_header_digest(std::span<const std::byte, kPageBytes> page);

/// One extent of the file.
struct ExportEntry {
  Key key;
  uint64_t offset = 0;         // in the file
  uint64_t bytes = 0;          // header and payload
  uint64_t header_digest = 0;  // covers the shards' digests, so the index covers every byte
  uint16_t group = 0;
  bool operator==(const ExportEntry&) const = default;
};

/// The digest that an encoded extent header carries of itself.
uint64_t extent_header_digest(std::span<const std::byte> header);

/// Index, its own offset and the trailing digest: the end of the file, from `offset` on.
std::vector<std::byte> encode_export_index(std::span<const ExportEntry> entries, uint64_t offset,
                                           uint64_t header_digest);
/// `bytes` is the rest of the file from `offset` on. `corrupt` when it is not exactly an index of this file.
Result<std::vector<ExportEntry>> decode_export_index(std::span<const std::byte> bytes, uint64_t offset,
                                                     uint64_t header_digest);

/// What begins at the front of `bytes`.
struct ExportPiece {
  enum class Kind : uint8_t {
    more,    // cannot be told from less than `bytes` bytes
    extent,  // of `bytes` bytes, header included
    index,   // the rest of the file
    junk,    // `bytes` bytes that are nothing
  };
  Kind kind = Kind::junk;
  uint64_t bytes = kPageBytes;
  std::optional<ExtentHeader> header;  // of an extent
};
/// `bytes` starts at a whole number of pages behind the manifest. Extents of other namespaces, and those
/// above kMaxExportedExtentBytes, are junk.
ExportPiece next_export_piece(std::span<const std::byte> bytes, const NamespaceDigest& ns);

}  // namespace tokendepot
