#include "store/journal_file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <thread>
#include <vector>

#include "depot_fixture.h"
#include "forked_child.h"

namespace tokendepot {
namespace {

class JournalFileTest : public ::testing::Test {
 protected:
  JournalFileTest() : directory_("/tmp") {}
  Record put(uint64_t n) {
    Record record;
    record.where = {{9, 1}, n * 4096, 4096};
    record.part = {0, 1, 0, 1};
    record.tokens = 16;
    record.time_ns = n + 1;
    return record;
  }
  std::vector<uint64_t> offsets(JournalReader& reader) {
    std::vector<uint64_t> seen;
    EXPECT_TRUE(reader.read_new([&](const Record& record) { seen.push_back(record.where.offset / 4096); }));
    return seen;
  }
  void damage(const std::string& path, uint64_t at) {
    const int fd = ::open(path.c_str(), O_RDWR);
    char byte = 0;
    ASSERT_EQ(pread(fd, &byte, 1, static_cast<off_t>(at)), 1);
    byte = static_cast<char>(byte ^ 1);
    ASSERT_EQ(pwrite(fd, &byte, 1, static_cast<off_t>(at)), 1);
    close(fd);
  }
  TemporaryDirectory directory_;
};

TEST_F(JournalFileTest, AReaderFollowsAWriterRecordByRecord) {
  auto writer = JournalWriter::create(directory_.path());
  ASSERT_TRUE(writer);
  auto reader = JournalReader::open(writer->path(), writer->writer());
  ASSERT_TRUE(reader);
  EXPECT_TRUE(offsets(*reader).empty());
  for (uint64_t n = 0; n < 3; ++n) ASSERT_TRUE(writer->append(put(n)));
  EXPECT_EQ(offsets(*reader), (std::vector<uint64_t>{0, 1, 2}));
  ASSERT_TRUE(writer->append(put(3)));
  EXPECT_EQ(offsets(*reader), (std::vector<uint64_t>{3}));
  EXPECT_FALSE(reader->has_tail());
}

TEST_F(JournalFileTest, ARecordWhoseReadFailedDoesNotCountAsRead) {
  auto writer = JournalWriter::create(directory_.path());
  ASSERT_TRUE(writer);
  auto reader = JournalReader::open(writer->path(), writer->writer());
  ASSERT_TRUE(reader);
  ASSERT_TRUE(writer->append(put(0)));
  EXPECT_EQ(offsets(*reader), (std::vector<uint64_t>{0}));
  EXPECT_TRUE(reader->has_read(kRecordBytes));
  ASSERT_TRUE(writer->append(put(1)));
  EXPECT_EQ(exit_code_of_child([&] {
              if (!break_reads(kRecordBytes, 2 * kRecordBytes)) return 1;
              if (reader->read_new([](const Record&) {})) return 2;
              return reader->has_read(2 * kRecordBytes) ? 3 : 0;
            }),
            0);
  EXPECT_EQ(offsets(*reader), (std::vector<uint64_t>{1}));
  EXPECT_TRUE(reader->has_read(2 * kRecordBytes));
}

TEST_F(JournalFileTest, ADamagedRecordCostsOnlyItself) {
  auto writer = JournalWriter::create(directory_.path());
  ASSERT_TRUE(writer);
  for (uint64_t n = 0; n < 10; ++n) ASSERT_TRUE(writer->append(put(n)));
  for (uint64_t at = 0; at < kRecordBytes; ++at) {
    damage(writer->path(), 4 * kRecordBytes + at);
    auto reader = JournalReader::open(writer->path(), writer->writer());
    ASSERT_TRUE(reader);
    EXPECT_EQ(offsets(*reader), (std::vector<uint64_t>{0, 1, 2, 3, 5, 6, 7, 8, 9})) << "byte " << at;
    EXPECT_EQ(reader->bad_records(), 1u);
    damage(writer->path(), 4 * kRecordBytes + at);
  }
}

TEST_F(JournalFileTest, ATornTailIsWaitedForAndReadWhenItIsWhole) {
  auto writer = JournalWriter::create(directory_.path());
  ASSERT_TRUE(writer);
  ASSERT_TRUE(writer->append(put(0)));
  ASSERT_TRUE(writer->append(put(1)));
  std::filesystem::resize_file(writer->path(), kRecordBytes + 50);
  auto reader = JournalReader::open(writer->path(), writer->writer());
  ASSERT_TRUE(reader);
  EXPECT_EQ(offsets(*reader), (std::vector<uint64_t>{0}));
  EXPECT_TRUE(reader->has_tail());
  ASSERT_TRUE(writer->append_at(1));
  ASSERT_TRUE(writer->append(put(7)));
  EXPECT_EQ(offsets(*reader), (std::vector<uint64_t>{7}));
  EXPECT_EQ(reader->bad_records(), 0u);
}

TEST_F(JournalFileTest, ALiveWritersJournalCannotBeTakenAndADeadOnesCan) {
  auto writer = JournalWriter::create(directory_.path());
  ASSERT_TRUE(writer);
  ASSERT_TRUE(writer->append(put(0)));
  const std::string path = writer->path();
  const uint64_t id = writer->writer();
  auto second = JournalWriter::lock(path, id);
  ASSERT_TRUE(second);
  EXPECT_FALSE(*second) << "the first writer lives";
  *writer = JournalWriter();  // its descriptor closes, as at death
  auto third = JournalWriter::lock(path, id);
  ASSERT_TRUE(third);
  ASSERT_TRUE(*third);
  ASSERT_TRUE((*third)->append_at(1));
  ASSERT_TRUE((*third)->append(put(1)));
  auto reader = JournalReader::open(path, id);
  ASSERT_TRUE(reader);
  EXPECT_EQ(offsets(*reader), (std::vector<uint64_t>{0, 1}));
}

TEST_F(JournalFileTest, ANewJournalThatAnotherAdoptsBeforeItIsLockedIsMadeAnew) {
  std::vector<JournalWriter> adopted;
  std::jthread adopter([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      const auto entries = list_directory(directory_.path());
      if (!entries) continue;
      for (const DirectoryEntry& entry : *entries) {
        auto taken =
            JournalWriter::lock(directory_.path() + "/" + entry.name, *writer_of_journal(entry.name));
        if (!taken || !*taken) continue;
        EXPECT_TRUE(remove_file((*taken)->path()));
        adopted.push_back(std::move(**taken));
      }
    }
  });
  std::vector<JournalWriter> made;
  for (int i = 0; i < 300; ++i) {
    auto writer = JournalWriter::create(directory_.path());
    ASSERT_TRUE(writer) << writer.error().message;
    ASSERT_TRUE(writer->append(put(0)));
    made.push_back(std::move(*writer));
  }
  adopter.request_stop();
  adopter.join();
  for (const JournalWriter& writer : made) EXPECT_TRUE(std::filesystem::exists(writer.path()));
  RecordProperty("adopted", static_cast<int>(adopted.size()));
}

TEST_F(JournalFileTest, ARecordOfAnotherJournalIsNotBelieved) {
  auto a = JournalWriter::create(directory_.path());
  auto b = JournalWriter::create(directory_.path());
  ASSERT_TRUE(a && b);
  ASSERT_TRUE(a->append(put(0)));
  std::filesystem::copy_file(a->path(), b->path(), std::filesystem::copy_options::overwrite_existing);
  auto reader = JournalReader::open(b->path(), b->writer());
  ASSERT_TRUE(reader);
  EXPECT_TRUE(offsets(*reader).empty());
}

TEST(Names, OfJournalsAndSegmentsAreStrict) {
  EXPECT_EQ(writer_of_journal("00000000000000ff.log"), 255u);
  for (const char* wrong :
       {"ff.log", "00000000000000FF.log", "00000000000000ff.log.bak", "00000000000000fg.log", ".log"}) {
    EXPECT_FALSE(writer_of_journal(wrong)) << wrong;
  }
  const SegmentId id{0x1234, 7};
  EXPECT_EQ(segment_of_name(segment_name(id)), id);
  for (const char* wrong :
       {"0000000000001234-00000007.seg.tmp", ".tmp-0000000000001234-00000007.seg", "x.seg"}) {
    EXPECT_FALSE(segment_of_name(wrong)) << wrong;
  }
}

}  // namespace
}  // namespace tokendepot
