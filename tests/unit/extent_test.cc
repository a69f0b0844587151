#include "format/extent.h"

#include <gtest/gtest.h>

#include "damage.h"
#include "format/shape.h"

namespace tokendepot {
namespace {

using damage::Bytes;

ExtentHeader header_of(const GroupShape& shape, damage::Random& random) {
  ExtentHeader header;
  header.key = random.digest<Key>();
  header.ns = random.digest<NamespaceDigest>();
  header.segment = {.writer = random.any<uint64_t>(), .sequence = random.any<uint32_t>()};
  header.offset = random.number(0, 1 << 20) * kPageBytes;
  header.group = shape.group;
  header.kind = shape.kind;
  header.part = shape.part;
  header.tokens = shape.tokens;
  header.block_tokens = shape.block_tokens;
  header.planes = shape.planes;
  header.row_bytes = shape.row_bytes;
  header.page_bytes = shape.page_bytes;
  header.stored_at_ns = random.any<uint64_t>();
  header.shard_digests.resize(shape.shards());
  for (uint64_t& digest : header.shard_digests) digest = random.any<uint64_t>();
  return header;
}

GroupShape shape_of_heads(uint16_t heads) {
  GroupShape shape;
  shape.group = 3;
  shape.part = {
      .layer_begin = 2, .layer_end = 6, .head_begin = 1, .head_end = static_cast<uint16_t>(heads + 1)};
  shape.tokens = 256;
  shape.block_tokens = 16;
  shape.planes = 2;
  shape.row_bytes = 130;
  return shape;
}

Bytes encoded(const ExtentHeader& header) {
  Bytes bytes(extent_header_bytes(static_cast<uint32_t>(header.shard_digests.size())), std::byte{0xee});
  encode_extent_header(header, bytes);
  return bytes;
}

Bytes encoded(const GroupShape& shape) {
  damage::Random random(8);
  return encoded(header_of(shape, random));
}

void expect_equal(const ExtentHeader& a, const ExtentHeader& b) {
  EXPECT_EQ(a.key, b.key);
  EXPECT_EQ(a.ns, b.ns);
  EXPECT_EQ(a.segment, b.segment);
  EXPECT_EQ(a.offset, b.offset);
  EXPECT_EQ(a.group, b.group);
  EXPECT_EQ(a.kind, b.kind);
  EXPECT_EQ(a.part, b.part);
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.block_tokens, b.block_tokens);
  EXPECT_EQ(a.planes, b.planes);
  EXPECT_EQ(a.row_bytes, b.row_bytes);
  EXPECT_EQ(a.page_bytes, b.page_bytes);
  EXPECT_EQ(a.stored_at_ns, b.stored_at_ns);
  EXPECT_EQ(a.shard_digests, b.shard_digests);
}

TEST(ExtentHeaderTest, what_is_written_is_read_whatever_the_shape) {
  damage::Random random(9);
  for (int round = 0; round < 500; ++round) {
    const ExtentHeader header = header_of(random.shape(), random);
    Bytes bytes = encoded(header);
    const auto read = decode_extent_header(bytes);
    ASSERT_TRUE(read.has_value()) << read.error().message;
    expect_equal(*read, header);
    bytes.resize(bytes.size() + 3 * kPageBytes, std::byte{0x77});
    ASSERT_TRUE(decode_extent_header(bytes).has_value()) << "with its payload behind it";
  }
}

TEST(ExtentHeaderTest, a_header_grows_by_a_page_when_its_digests_fill_one) {
  EXPECT_EQ(extent_header_bytes(1), kPageBytes);
  EXPECT_EQ(extent_header_bytes(480), kPageBytes);
  EXPECT_EQ(extent_header_bytes(481), 2 * kPageBytes);
  EXPECT_EQ(extent_header_bytes(480 + 512), 2 * kPageBytes);
  EXPECT_EQ(extent_header_bytes(480 + 512 + 1), 3 * kPageBytes);
  EXPECT_EQ(extent_header_bytes(65535), 129 * kPageBytes);
}

TEST(ExtentHeaderTest, the_largest_header_is_read) {
  GroupShape shape = shape_of_heads(1);
  shape.part.head_begin = 0;
  shape.part.head_end = 65535;
  damage::Random random(10);
  const ExtentHeader header = header_of(shape, random);
  const auto read = decode_extent_header(encoded(header));
  ASSERT_TRUE(read.has_value()) << read.error().message;
  expect_equal(*read, header);
}

TEST(ExtentHeaderTest, header_and_payload_make_the_extent) {
  const GroupShape shape = shape_of_heads(8);
  EXPECT_EQ(shape.shard_bytes(), 4u * 2 * 256 * 130);
  EXPECT_EQ(extent_bytes(shape), kPageBytes + 8 * align_up(4 * 2 * 256 * 130));
}

TEST(ExtentHeaderTest, fields_lie_where_the_format_says) {
  const GroupShape shape = shape_of_heads(2);
  damage::Random random(11);
  ExtentHeader header = header_of(shape, random);
  header.key.bytes.fill(0x11);
  header.ns.bytes.fill(0x22);
  header.segment = {.writer = 0x3333333333333333, .sequence = 0x44444444};
  header.offset = 0x5000;
  header.stored_at_ns = 0x6666666666666666;
  const Bytes bytes = encoded(header);
  using damage::get;
  EXPECT_EQ(std::memcmp(bytes.data(), "TDEXTENT", 8), 0);
  EXPECT_EQ(get<uint32_t>(bytes, 8), 1u);
  EXPECT_EQ(get<uint32_t>(bytes, 12), 4096u);
  EXPECT_EQ(get<uint8_t>(bytes, 16), 0x11);
  EXPECT_EQ(get<uint8_t>(bytes, 47), 0x11);
  EXPECT_EQ(get<uint8_t>(bytes, 48), 0x22);
  EXPECT_EQ(get<uint8_t>(bytes, 79), 0x22);
  EXPECT_EQ(get<uint64_t>(bytes, 80), 0x3333333333333333u);
  EXPECT_EQ(get<uint32_t>(bytes, 88), 0x44444444u);
  EXPECT_EQ(get<uint32_t>(bytes, 92), 2u);
  EXPECT_EQ(get<uint64_t>(bytes, 96), 0x5000u);
  EXPECT_EQ(get<uint64_t>(bytes, 104), shape.payload_bytes());
  EXPECT_EQ(get<uint64_t>(bytes, 112), shape.shard_stride());
  EXPECT_EQ(get<uint64_t>(bytes, 120), shape.shard_bytes());
  EXPECT_EQ(get<uint64_t>(bytes, 128), 0x6666666666666666u);
  EXPECT_EQ(get<uint16_t>(bytes, 136), 3);
  EXPECT_EQ(get<uint8_t>(bytes, 138), 1);
  EXPECT_EQ(get<uint16_t>(bytes, 140), 2);
  EXPECT_EQ(get<uint16_t>(bytes, 142), 6);
  EXPECT_EQ(get<uint16_t>(bytes, 144), 1);
  EXPECT_EQ(get<uint16_t>(bytes, 146), 3);
  EXPECT_EQ(get<uint32_t>(bytes, 148), 256u);
  EXPECT_EQ(get<uint32_t>(bytes, 152), 16u);
  EXPECT_EQ(get<uint16_t>(bytes, 156), 2);
  EXPECT_EQ(get<uint32_t>(bytes, 160), 130u);
  EXPECT_EQ(get<uint32_t>(bytes, 164), 0u);
  EXPECT_EQ(get<uint64_t>(bytes, 256), header.shard_digests[0]);
  EXPECT_EQ(get<uint64_t>(bytes, 264), header.shard_digests[1]);
  Bytes resealed = bytes;
  damage::reseal_header(resealed);
  EXPECT_EQ(resealed, bytes) << "the digest is a shard's digest of the header with its digest field zeroed";
}

TEST(ExtentHeaderTest, every_changed_byte_is_seen) {
  const auto decode = [](const Bytes& bytes) { return decode_extent_header(bytes); };
  damage::expect_every_changed_byte_is_seen(encoded(shape_of_heads(8)), decode);
  damage::expect_every_changed_byte_is_seen(encoded(shape_of_heads(600)), decode);
}

TEST(ExtentHeaderTest, every_shortened_header_is_seen) {
  const auto decode = [](const Bytes& bytes) { return decode_extent_header(bytes); };
  damage::expect_every_shortened_copy_is_seen(encoded(shape_of_heads(8)), decode);
  damage::expect_every_shortened_copy_is_seen(encoded(shape_of_heads(600)), decode);
}

TEST(ExtentHeaderTest, another_format_version_is_unsupported) {
  Bytes bytes = encoded(shape_of_heads(1));
  damage::set<uint32_t>(bytes, 8, 2);
  damage::reseal_header(bytes);
  EXPECT_EQ(decode_extent_header(bytes).error().kind, ErrorKind::unsupported);
}

TEST(ExtentHeaderTest, sizes_that_do_not_follow_from_the_shape_are_refused_though_the_digest_is_right) {
  // header bytes, shards, offset, payload bytes, stride, shard bytes, kind, tokens, block tokens, planes, row
  // bytes, page bytes, the three reserved ranges, and the tail behind the last digest.
  for (const size_t at :
       {13, 92, 96, 104, 112, 120, 138, 148, 152, 156, 160, 164, 139, 158, 176, 255, 320, 4095}) {
    Bytes bytes = encoded(shape_of_heads(8));
    bytes[at] ^= std::byte{1};
    damage::reseal_header(bytes);
    const auto read = decode_extent_header(bytes);
    ASSERT_FALSE(read.has_value()) << at;
    EXPECT_EQ(read.error().kind, ErrorKind::corrupt) << at;
  }
}

TEST(ExtentHeaderTest, huge_values_in_every_field_neither_overflow_nor_allocate) {
  for (const size_t field : {12, 92, 104, 112, 120, 140, 142, 144, 146, 148, 152, 156, 160, 164}) {
    for (const uint32_t value : {0u, 0xffffu, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
      Bytes bytes = encoded(shape_of_heads(8));
      if (damage::get<uint32_t>(bytes, field) == value) continue;
      damage::set(bytes, field, value);
      damage::reseal_header(bytes);
      EXPECT_FALSE(decode_extent_header(bytes).has_value()) << field << " = " << value;
    }
  }
}

TEST(ShapeTest, products_beyond_64_bits_are_refused) {
  GroupShape shape = shape_of_heads(1);
  shape.part = {.layer_begin = 0, .layer_end = 65535, .head_begin = 0, .head_end = 65535};
  shape.tokens = kMaxTokens;
  shape.block_tokens = 1;
  shape.row_bytes = kMaxRowBytes;
  EXPECT_FALSE(check_shape(shape).has_value());
  shape.kind = LayoutKind::opaque;
  shape.part.head_end = 1;
  shape.row_bytes = 0;
  shape.page_bytes = kMaxRowBytes;
  EXPECT_FALSE(check_shape(shape).has_value());
}

TEST(ShapeTest, the_largest_payload_is_allowed_and_one_page_more_is_not) {
  GroupShape shape;
  shape.part = {.layer_begin = 0, .layer_end = 1, .head_begin = 0, .head_end = 1};
  shape.planes = 1;
  shape.tokens = 1 << 20;
  shape.block_tokens = 16;
  shape.row_bytes = 1 << 20;
  EXPECT_TRUE(check_shape(shape).has_value());
  EXPECT_EQ(shape.payload_bytes(), kMaxPayloadBytes);
  shape.row_bytes += 1;
  EXPECT_FALSE(check_shape(shape).has_value());
}

TEST(ExtentHeaderDeathTest, writing_a_header_into_less_room_than_it_needs_is_a_bug) {
  damage::Random random(13);
  const ExtentHeader header = header_of(shape_of_heads(481), random);
  Bytes bytes(kPageBytes);
  EXPECT_DEATH(encode_extent_header(header, bytes), "check failed");
}

TEST(ExtentHeaderDeathTest, a_header_with_too_few_digests_is_a_bug) {
  damage::Random random(14);
  ExtentHeader header = header_of(shape_of_heads(2), random);
  header.shard_digests.pop_back();
  Bytes bytes(kPageBytes);
  EXPECT_DEATH(encode_extent_header(header, bytes), "check failed");
}

}  // namespace
}  // namespace tokendepot
