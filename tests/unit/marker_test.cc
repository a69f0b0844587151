#include "format/marker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "damage.h"

namespace tokendepot {
namespace {

using damage::Bytes;

Bytes encoded(const Marker& marker) {
  Bytes bytes(kPageBytes, std::byte{0xee});
  encode_marker(marker, std::span<std::byte, kPageBytes>(bytes));
  return bytes;
}

Marker sample() {
  Marker marker;
  for (size_t i = 0; i < marker.root_id.size(); ++i) marker.root_id[i] = static_cast<uint8_t>(0xa0 + i);
  marker.created_ns = 0x1122334455667788;
  return marker;
}

TEST(MarkerTest, what_is_written_is_read) {
  damage::Random random(3);
  for (int round = 0; round < 100; ++round) {
    Marker marker;
    for (uint8_t& byte : marker.root_id) byte = random.any<uint8_t>();
    marker.created_ns = random.any<uint64_t>();
    const auto read = decode_marker(encoded(marker));
    ASSERT_TRUE(read.has_value()) << read.error().message;
    EXPECT_EQ(*read, marker);
  }
}

TEST(MarkerTest, fields_lie_where_the_format_says) {
  const Bytes bytes = encoded(sample());
  EXPECT_EQ(std::memcmp(bytes.data(), "TDDEPOT\n", 8), 0);
  EXPECT_EQ(damage::get<uint32_t>(bytes, 8), 1u);
  EXPECT_EQ(damage::get<uint8_t>(bytes, 16), 0xa0);
  EXPECT_EQ(damage::get<uint8_t>(bytes, 31), 0xaf);
  EXPECT_EQ(damage::get<uint64_t>(bytes, 32), 0x1122334455667788u);
  EXPECT_EQ(damage::get<uint64_t>(bytes, 4088), xxh3(std::span(bytes).first(4088)));
}

TEST(MarkerTest, every_changed_byte_is_seen) {
  damage::expect_every_changed_byte_is_seen(encoded(sample()),
                                            [](const Bytes& b) { return decode_marker(b); });
}

TEST(MarkerTest, every_shortened_file_is_seen) {
  damage::expect_every_shortened_copy_is_seen(encoded(sample()),
                                              [](const Bytes& b) { return decode_marker(b); });
}

TEST(MarkerTest, a_longer_file_is_not_a_marker) {
  Bytes bytes = encoded(sample());
  bytes.push_back(std::byte{0});
  ASSERT_FALSE(decode_marker(bytes).has_value());
  EXPECT_EQ(decode_marker(bytes).error().kind, ErrorKind::corrupt);
}

TEST(MarkerTest, another_format_version_is_refused_with_both_versions_named) {
  Bytes bytes = encoded(sample());
  damage::set<uint32_t>(bytes, 8, 7);
  damage::reseal(bytes);
  const auto read = decode_marker(bytes);
  ASSERT_FALSE(read.has_value());
  EXPECT_EQ(read.error().kind, ErrorKind::unsupported);
  EXPECT_THAT(read.error().message, ::testing::HasSubstr("version 7"));
  EXPECT_THAT(read.error().message, ::testing::HasSubstr("version 1"));
}

TEST(MarkerTest, reserved_bytes_that_are_used_are_refused_though_the_digest_is_right) {
  for (const size_t at : {12, 15, 40, 2000, 4087}) {
    Bytes bytes = encoded(sample());
    damage::set<uint8_t>(bytes, at, 1);
    damage::reseal(bytes);
    ASSERT_FALSE(decode_marker(bytes).has_value()) << at;
    EXPECT_EQ(decode_marker(bytes).error().kind, ErrorKind::corrupt);
  }
}

TEST(MarkerTest, somebody_elses_file_is_not_a_marker) {
  const Bytes zeros(kPageBytes);
  EXPECT_EQ(decode_marker(zeros).error().kind, ErrorKind::corrupt);
  EXPECT_EQ(decode_marker({}).error().kind, ErrorKind::corrupt);
}

}  // namespace
}  // namespace tokendepot
