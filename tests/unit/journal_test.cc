#include "format/journal.h"

#include <gtest/gtest.h>

#include "damage.h"

namespace tokendepot {
namespace {

using damage::Bytes;

Bytes encoded(const Record& record) {
  Bytes bytes(kRecordBytes, std::byte{0xee});
  encode_record(record, std::span<std::byte, kRecordBytes>(bytes));
  return bytes;
}

Result<Record> decoded(const Bytes& bytes, uint64_t journal, uint64_t index) {
  return decode_record(std::span<const std::byte, kRecordBytes>(bytes), journal, index);
}

Record random_put(damage::Random& random) {
  Record record;
  record.kind = random.number(0, 1) == 0 ? LayoutKind::canonical : LayoutKind::opaque;
  record.group = random.any<uint16_t>();
  record.index = random.any<uint64_t>();
  record.journal = random.any<uint64_t>();
  record.key = random.digest<Key>();
  record.ns_prefix = random.any<uint64_t>();
  record.where = {.segment = {.writer = random.any<uint64_t>(), .sequence = random.any<uint32_t>()},
                  .offset = random.number(0, 1ull << 40) * kPageBytes,
                  .bytes = random.number(1, 1ull << 20) * kPageBytes};
  record.part = random.part();
  record.tokens = static_cast<uint32_t>(random.number(1, 1 << 20));
  record.time_ns = random.any<uint64_t>();
  return record;
}

TEST(JournalRecordTest, what_is_written_is_read) {
  damage::Random random(4);
  for (int round = 0; round < 1000; ++round) {
    const Record record = random_put(random);
    const auto read = decoded(encoded(record), record.journal, record.index);
    ASSERT_TRUE(read.has_value()) << read.error().message;
    EXPECT_EQ(*read, record);
  }
}

TEST(JournalRecordTest, records_that_name_no_extent_are_read_too) {
  for (const auto type : {RecordType::seal, RecordType::condemn_extent, RecordType::condemn_segment,
                          RecordType::touch, RecordType::open_segment, RecordType::adopt_segment}) {
    Record record;
    record.type = type;
    record.journal = 5;
    record.index = 9;
    record.where.segment = {.writer = 1, .sequence = 2};
    const auto read = decoded(encoded(record), 5, 9);
    ASSERT_TRUE(read.has_value()) << read.error().message;
    EXPECT_EQ(*read, record);
  }
}

TEST(JournalRecordTest, fields_lie_where_the_format_says) {
  Record record;
  record.type = RecordType::put;
  record.kind = LayoutKind::opaque;
  record.group = 0x0102;
  record.index = 0x1111111111111111;
  record.journal = 0x2222222222222222;
  record.key.bytes.fill(0x33);
  record.ns_prefix = 0x4444444444444444;
  record.where = {
      .segment = {.writer = 0x5555555555555555, .sequence = 0x66666666}, .offset = 0x7000, .bytes = 0x8000};
  record.part = {.layer_begin = 0x10, .layer_end = 0x11, .head_begin = 0x12, .head_end = 0x13};
  record.tokens = 0x999;
  record.time_ns = 0xaaaaaaaaaaaaaaaa;
  const Bytes bytes = encoded(record);
  using damage::get;
  EXPECT_EQ(std::memcmp(bytes.data(), "TDJR", 4), 0);
  EXPECT_EQ(get<uint16_t>(bytes, 4), 1);
  EXPECT_EQ(get<uint8_t>(bytes, 6), 1);
  EXPECT_EQ(get<uint8_t>(bytes, 7), 2);
  EXPECT_EQ(get<uint64_t>(bytes, 8), 0x1111111111111111u);
  EXPECT_EQ(get<uint64_t>(bytes, 16), 0x2222222222222222u);
  EXPECT_EQ(get<uint64_t>(bytes, 24), 0x5555555555555555u);
  EXPECT_EQ(get<uint32_t>(bytes, 32), 0x66666666u);
  EXPECT_EQ(get<uint16_t>(bytes, 36), 0x0102);
  EXPECT_EQ(get<uint16_t>(bytes, 38), 0);
  EXPECT_EQ(get<uint64_t>(bytes, 40), 0x7000u);
  EXPECT_EQ(get<uint64_t>(bytes, 48), 0x8000u);
  EXPECT_EQ(get<uint64_t>(bytes, 56), 0x4444444444444444u);
  EXPECT_EQ(get<uint64_t>(bytes, 64), 0xaaaaaaaaaaaaaaaau);
  EXPECT_EQ(get<uint64_t>(bytes, 72), 0x0013001200110010u);
  EXPECT_EQ(get<uint32_t>(bytes, 80), 0x999u);
  EXPECT_EQ(get<uint32_t>(bytes, 84), 0u);
  EXPECT_EQ(get<uint8_t>(bytes, 88), 0x33);
  EXPECT_EQ(get<uint8_t>(bytes, 119), 0x33);
  EXPECT_EQ(get<uint64_t>(bytes, 120), xxh3(std::span(bytes).first(120)));
}

TEST(JournalRecordTest, every_change_of_every_byte_is_seen) {
  damage::Random random(5);
  const Record record = random_put(random);
  Bytes bytes = encoded(record);
  for (std::byte& byte : bytes) {
    for (int mask = 1; mask < 256; ++mask) {
      byte ^= static_cast<std::byte>(mask);
      const auto read = decoded(bytes, record.journal, record.index);
      ASSERT_FALSE(read.has_value());
      ASSERT_EQ(read.error().kind, ErrorKind::corrupt);
      byte ^= static_cast<std::byte>(mask);
    }
  }
}

TEST(JournalRecordTest, a_record_cut_short_at_any_length_is_seen) {
  damage::Random random(6);
  const Record record = random_put(random);
  for (size_t size = 0; size < kRecordBytes; ++size) {
    Bytes bytes = encoded(record);
    std::fill(bytes.begin() + static_cast<std::ptrdiff_t>(size), bytes.end(), std::byte{0});
    if (bytes == encoded(record)) continue;  // its last bytes happen to be zero
    ASSERT_FALSE(decoded(bytes, record.journal, record.index).has_value()) << size;
  }
}

TEST(JournalRecordTest, a_record_copied_to_another_journal_or_place_is_seen) {
  damage::Random random(7);
  const Record record = random_put(random);
  EXPECT_FALSE(decoded(encoded(record), record.journal + 1, record.index).has_value());
  EXPECT_FALSE(decoded(encoded(record), record.journal, record.index + 1).has_value());
}

TEST(JournalRecordTest, values_that_no_writer_writes_are_refused_though_the_digest_is_right) {
  struct Case {
    size_t at;
    uint8_t value;
  };
  // Type 0 and 8, kind 0 and 3, reserved bytes, offset and length off the page, and a length that is too
  // large.
  for (const Case c : {Case{6, 0}, Case{6, 8}, Case{7, 0}, Case{7, 3}, Case{38, 1}, Case{84, 1}, Case{40, 1},
                       Case{48, 1}, Case{47, 0x80}, Case{55, 0x80}}) {
    Record record;
    record.where.bytes = 2 * kPageBytes;
    record.part = {.layer_begin = 0, .layer_end = 1, .head_begin = 0, .head_end = 1};
    record.tokens = 16;
    Bytes bytes = encoded(record);
    ASSERT_TRUE(decoded(bytes, 0, 0).has_value());
    damage::set(bytes, c.at, c.value);
    damage::reseal(bytes);
    const auto read = decoded(bytes, 0, 0);
    ASSERT_FALSE(read.has_value()) << c.at;
    EXPECT_EQ(read.error().kind, ErrorKind::corrupt) << c.at;
  }
}

TEST(JournalRecordTest, a_put_of_nothing_is_refused) {
  Record good;
  good.where.bytes = 2 * kPageBytes;
  good.part = {.layer_begin = 0, .layer_end = 1, .head_begin = 0, .head_end = 1};
  good.tokens = 16;
  ASSERT_TRUE(decoded(encoded(good), 0, 0).has_value());
  Record bad = good;
  bad.where.bytes = 0;
  EXPECT_FALSE(decoded(encoded(bad), 0, 0).has_value());
  bad = good;
  bad.part.layer_end = 0;
  EXPECT_FALSE(decoded(encoded(bad), 0, 0).has_value());
  bad = good;
  bad.part.head_begin = 2;
  EXPECT_FALSE(decoded(encoded(bad), 0, 0).has_value());
  bad = good;
  bad.tokens = 0;
  EXPECT_FALSE(decoded(encoded(bad), 0, 0).has_value());
  bad.tokens = (1u << 20) + 1;
  EXPECT_FALSE(decoded(encoded(bad), 0, 0).has_value());
}

TEST(JournalRecordTest, a_record_of_another_version_is_left_to_that_version) {
  Record record;
  record.type = RecordType::touch;
  Bytes bytes = encoded(record);
  damage::set<uint16_t>(bytes, 4, 2);
  damage::reseal(bytes);
  const auto read = decoded(bytes, 0, 0);
  ASSERT_FALSE(read.has_value());
  EXPECT_EQ(read.error().kind, ErrorKind::unsupported);
}

TEST(JournalRecordTest, the_namespace_prefix_is_the_first_eight_bytes_little_endian) {
  NamespaceDigest ns;
  for (size_t i = 0; i < ns.bytes.size(); ++i) ns.bytes[i] = static_cast<uint8_t>(i + 1);
  EXPECT_EQ(prefix_of(ns), 0x0807060504030201u);
}

}  // namespace
}  // namespace tokendepot
