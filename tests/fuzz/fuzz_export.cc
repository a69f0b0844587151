// Any bytes as an export file: as they are, and with its first page's and its end's digests made right,
// walked as the importer walks it.
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/bytes.h"
#include "base/check.h"
#include "format/digest.h"
#include "format/export_file.h"

namespace {

using namespace tokendepot;
using Bytes = std::vector<std::byte>;

void walk(std::span<const std::byte> file) {
  if (file.size() < kPageBytes) {
    TD_CHECK(!decode_export_header(file));
    return;
  }
  const auto page = file.first<kPageBytes>();
  const auto header = decode_export_header(page);
  if (!header) return;
  Bytes again(kPageBytes);
  encode_export_header(*header, std::span<std::byte, kPageBytes>(again));
  TD_CHECK(std::memcmp(again.data(), page.data(), kPageBytes) == 0);

  uint64_t at = kPageBytes + align_up(header->manifest_bytes);
  while (at < file.size()) {
    ExportPiece piece = next_export_piece(file.subspan(at), header->ns);
    if (piece.kind == ExportPiece::Kind::index) {
      const auto index = decode_export_index(file.subspan(at), at, export_header_digest(page));
      if (!index) return;
      const Bytes end = encode_export_index(*index, at, export_header_digest(page));
      TD_CHECK(end.size() == file.size() - at && std::memcmp(end.data(), file.data() + at, end.size()) == 0);
      return;
    }
    TD_CHECK(piece.bytes > 0);
    TD_CHECK((piece.kind == ExportPiece::Kind::extent) == piece.header.has_value());
    if (piece.kind == ExportPiece::Kind::more) {
      TD_CHECK(piece.bytes > file.size() - at);
      return;
    }
    at += piece.bytes;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  walk(std::as_bytes(std::span(data, size)));

  // A good first page with one page of manifest, then the input, then as much of an index as the input asks
  // for.
  Bytes file(2 * kPageBytes);
  ExportHeader header;
  header.manifest_bytes = 2;
  if (size >= 32) std::memcpy(header.ns.bytes.data(), data, 32);
  encode_export_header(header, std::span<std::byte, kPageBytes>(file.data(), kPageBytes));
  file.resize(2 * kPageBytes + align_up(size));
  if (size > 0) std::memcpy(file.data() + 2 * kPageBytes, data, size);
  std::vector<ExportEntry> entries(size % 5);
  for (size_t i = 0; i < entries.size(); ++i) entries[i].offset = i;
  const auto first = std::span<const std::byte, kPageBytes>(file.data(), kPageBytes);
  Bytes end = encode_export_index(entries, file.size(), export_header_digest(first));
  if (size > 0) end.resize(end.size() - data[size - 1] % 3);
  file.insert(file.end(), end.begin(), end.end());
  walk(file);
  return 0;
}
