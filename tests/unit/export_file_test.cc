// The bytes of an export file: every change of them is seen, and what is left of a damaged file is found.
#include "format/export_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "damage.h"

namespace tokendepot::damage {
namespace {

constexpr uint64_t kHeaderDigest = 77;

ExportHeader some_header() {
  Random random(1);
  ExportHeader header;
  header.ns = random.digest<NamespaceDigest>();
  header.manifest_bytes = 1234;
  header.created_ns = 5;
  header.extents = 6;
  header.bytes = 7;
  return header;
}

Bytes encoded(const ExportHeader& header) {
  Bytes page(kPageBytes);
  encode_export_header(header, std::span<std::byte, kPageBytes>(page));
  return page;
}

std::vector<ExportEntry> some_entries(size_t count) {
  Random random(2);
  std::vector<ExportEntry> entries(count);
  for (ExportEntry& entry : entries) {
    entry = {.key = random.digest<Key>(),
             .offset = random.any<uint64_t>(),
             .bytes = random.any<uint64_t>(),
             .header_digest = random.any<uint64_t>(),
             .group = random.any<uint16_t>()};
  }
  return entries;
}

/// Header and payload of one extent, as a segment has it.
Bytes some_extent(uint64_t seed, const NamespaceDigest& ns) {
  Random random(seed);
  ExtentHeader header;
  GroupShape shape = random.shape();
  shape.row_bytes %= 64;
  shape.page_bytes %= 4096;
  if (shape.kind == LayoutKind::canonical) {
    shape.row_bytes += 1;
    shape.part.head_end = static_cast<uint16_t>(shape.part.head_begin + 3);
  } else {
    shape.page_bytes += 1;
  }
  header.set_shape(shape);
  header.key = random.digest<Key>();
  header.ns = ns;
  header.segment = {random.any<uint64_t>(), random.any<uint32_t>()};
  header.shard_digests.resize(shape.shards());
  Bytes extent(extent_bytes(shape));
  const uint64_t head = extent_header_bytes(shape.shards());
  for (uint32_t i = 0; i < shape.shards(); ++i) {
    header.shard_digests[i] =
        shard_digest(std::span(extent).subspan(head + i * shape.shard_stride(), shape.shard_stride()));
  }
  encode_extent_header(header, extent);
  return extent;
}

TEST(ExportFile, TheFirstPageComesBackAndEveryChangeOfItIsSeen) {
  const Bytes page = encoded(some_header());
  EXPECT_EQ(decode_export_header(page).value(), some_header());
  expect_every_changed_byte_is_seen(page, decode_export_header);
  expect_every_shortened_copy_is_seen(page, decode_export_header);
}

TEST(ExportFile, AnotherVersionIsUnsupportedAndNamed) {
  for (const size_t at : {size_t{8}, size_t{12}}) {
    Bytes page = encoded(some_header());
    set<uint32_t>(page, at, 9);
    reseal(page);
    const auto decoded = decode_export_header(page);
    ASSERT_FALSE(decoded);
    EXPECT_EQ(decoded.error().kind, ErrorKind::unsupported);
    EXPECT_THAT(decoded.error().message, ::testing::HasSubstr("9"));
  }
}

TEST(ExportFile, AManifestLargerThanAnyIsRefused) {
  for (const uint64_t bytes : {uint64_t{0}, (uint64_t{1} << 20) + 1, ~uint64_t{0}}) {
    ExportHeader header = some_header();
    header.manifest_bytes = bytes;
    EXPECT_EQ(decode_export_header(encoded(header)).error().kind, ErrorKind::corrupt) << bytes;
  }
}

TEST(ExportFile, TheIndexComesBackAndEveryChangeOfItIsSeen) {
  for (const size_t count : {size_t{0}, size_t{1}, size_t{9}}) {
    const auto entries = some_entries(count);
    const Bytes bytes = encode_export_index(entries, 4096, kHeaderDigest);
    const auto decode = [](const Bytes& b) { return decode_export_index(b, 4096, kHeaderDigest); };
    EXPECT_EQ(decode(bytes).value(), entries);
    expect_every_changed_byte_is_seen(bytes, decode);
    expect_every_shortened_copy_is_seen(bytes, decode);
    Bytes longer = bytes;
    longer.push_back(std::byte{0});
    EXPECT_FALSE(decode(longer));
  }
}

TEST(ExportFile, AnIndexOfAnotherFileOrPlaceIsNotThisFiles) {
  const Bytes bytes = encode_export_index(some_entries(3), 4096, kHeaderDigest);
  EXPECT_TRUE(decode_export_index(bytes, 4096, kHeaderDigest));
  EXPECT_EQ(decode_export_index(bytes, 8192, kHeaderDigest).error().kind, ErrorKind::corrupt);
  EXPECT_EQ(decode_export_index(bytes, 4096, kHeaderDigest + 1).error().kind, ErrorKind::corrupt);
}

TEST(ExportFile, AnExtentIsFoundWithItsLength) {
  const NamespaceDigest ns = some_header().ns;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    const Bytes extent = some_extent(seed, ns);
    const ExportPiece piece = next_export_piece(extent, ns);
    ASSERT_EQ(piece.kind, ExportPiece::Kind::extent) << seed;
    EXPECT_EQ(piece.bytes, extent.size());
    const auto first = std::span(extent).first(extent_header_bytes(piece.header->shape().shards()));
    EXPECT_EQ(next_export_piece(first, ns).kind, ExportPiece::Kind::extent);
    if (first.size() > kPageBytes) {
      const ExportPiece more = next_export_piece(first.first(kPageBytes), ns);
      EXPECT_EQ(more.kind, ExportPiece::Kind::more);
      EXPECT_EQ(more.bytes, first.size());
    }
  }
}

TEST(ExportFile, WhatIsNoExtentOfTheNamespaceIsJunkOfOnePage) {
  const NamespaceDigest ns = some_header().ns;
  const Bytes good = some_extent(3, ns);
  NamespaceDigest other = ns;
  other.bytes[31] ^= 1;
  EXPECT_EQ(next_export_piece(good, other).kind, ExportPiece::Kind::junk);
  for (size_t at = 0; at < 256; ++at) {
    Bytes bad = good;
    bad[at] ^= std::byte{0x10};
    const ExportPiece piece = next_export_piece(bad, ns);
    EXPECT_NE(piece.kind, ExportPiece::Kind::extent) << at;
    if (piece.kind == ExportPiece::Kind::junk) {
      EXPECT_EQ(piece.bytes, kPageBytes) << at;
    }
  }
  EXPECT_EQ(next_export_piece(Bytes(100), ns).bytes, 100u);
}

TEST(ExportFile, AnExtentThatNobodyCanHoldIsJunk) {
  ExtentHeader header;
  GroupShape shape;
  shape.part = {0, 1000, 0, 8};
  shape.tokens = shape.block_tokens = 1024;
  shape.row_bytes = 1024;
  header.set_shape(shape);
  header.shard_digests.resize(shape.shards());
  ASSERT_GT(extent_bytes(shape), kMaxExportedExtentBytes);
  Bytes bytes(extent_header_bytes(shape.shards()));
  encode_extent_header(header, bytes);
  ASSERT_TRUE(decode_extent_header(bytes));
  EXPECT_EQ(next_export_piece(bytes, header.ns).kind, ExportPiece::Kind::junk);
}

}  // namespace
}  // namespace tokendepot::damage
