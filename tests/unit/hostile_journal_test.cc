// A shared root in which another tenant writes journals as it likes: what a reader does with them is bounded
// in memory and work, and it goes on to serve what is really there.
#include <cstring>
#include <filesystem>
#include <fstream>

#include "format/journal.h"
#include "store/catalog.h"
#include "store/journal_file.h"
#include "store/replay.h"
#include "transfers_fixture.h"

namespace tokendepot::testing {
namespace {

constexpr uint64_t kForger = 0xf0;

/// Writes a journal whose records all prove themselves: `forge` fills in the rest of record n.
void write_journal(const std::string& directory, uint64_t records, void (*forge)(Record&, uint64_t)) {
  std::vector<std::byte> bytes(records * kRecordBytes);
  for (uint64_t n = 0; n < records; ++n) {
    Record record;
    record.journal = kForger;
    record.index = n;
    record.where = {{kForger, 0}, n * kPageBytes, kPageBytes};
    record.part = {0, 1, 0, 1};
    record.tokens = 1;
    forge(record, n);
    encode_record(record, std::span<std::byte, kRecordBytes>(bytes.data() + n * kRecordBytes, kRecordBytes));
  }
  std::ofstream file(directory + "/" + journal_name(kForger), std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

class HostileJournal : public TransfersOn {
 protected:
  std::string journals() const { return directory_.path() + "/root/journals"; }
  /// Chunks of an honest writer, which has ended.
  void store_honestly() {
    const auto depot = open();
    ASSERT_TRUE(depot->attach(cache_.paged()));
    cache_.fill(1);
    keys_ = prompt_keys(ns_, 1, 8);
    store_all(*depot, keys_, 0, 8);
  }
  void expect_served() {
    Options reading = options();
    reading.writer = false;
    reading.open_wait_ms = 120'000;  // a busy machine reads the forger's records for longer than the default
    const auto depot = open(reading);
    ASSERT_TRUE(depot->attach(cache_.paged()));
    const auto before = blocks(0, 32);
    ASSERT_EQ(depot->longest_prefix(keys_, std::vector{want_}), 8u);
    EXPECT_EQ(load(*depot, plan_of(*depot, keys_, 0, 8, 128)).items_ok, 8u);
    EXPECT_EQ(blocks(128, 32), before);
  }
  /// Replays the root's journals into tables of the test's own.
  void replay() {
    auto root = Root::open(options().roots[0], 0, options());
    ASSERT_TRUE(root) << root.error().message;
    Replay replay(**root, segments_, &catalog_);
    ASSERT_TRUE(replay.first());
    records_ = replay.records();
  }

  std::vector<Key> keys_;
  SegmentTable segments_;
  Catalog catalog_{segments_};
  uint64_t records_ = 0;
};

TEST_P(HostileJournal, MayNameAnyNumberOfSegmentsAndAreBelievedOnlyInThoseThatAreThere) {
  store_honestly();
  constexpr uint64_t kForged = 300'000;
  write_journal(journals(), kForged, [](Record& record, uint64_t n) {
    record.type = n % 2 == 0 ? RecordType::open_segment : RecordType::condemn_segment;
    record.where = {{n + 1000, static_cast<uint32_t>(n)}, 0, kPageBytes};
  });
  replay();
  EXPECT_GE(records_, kForged);
  EXPECT_LE(segments_.size(), (1u << 16) + 16) << "slots for segments that do not exist";
  expect_served();
}

TEST_P(HostileJournal, MayNameAnyNumberOfShapesAndFewAreKept) {
  store_honestly();
  write_journal(journals(), 100'000, [](Record& record, uint64_t n) {
    record.part = {static_cast<uint16_t>(n % 65000), static_cast<uint16_t>(n % 65000 + 1), 0, 1};
    record.tokens = static_cast<uint32_t>(1 + n / 65000);
  });
  replay();
  EXPECT_LE(catalog_.entries(), 1024u + 8);
}

TEST_P(HostileJournal, MayBeAHoleOfATerabyteAndIsLeftAtItsBeginning) {
  store_honestly();
  write_journal(journals(), 3, [](Record&, uint64_t) {});
  const std::string path = journals() + "/" + journal_name(kForger);
  std::filesystem::resize_file(path, 1ull << 40);
  auto reader = JournalReader::open(path, kForger);
  ASSERT_TRUE(reader);
  const auto good = reader->read_new([](const Record&) {});
  ASSERT_TRUE(good) << good.error().message;
  EXPECT_EQ(*good, 3u);
  EXPECT_TRUE(reader->has_tail());
  expect_served();
}

TEST_P(HostileJournal, MaySayThatSegmentsAreLargerThanTheyAre) {
  store_honestly();
  std::ofstream(directory_.path() + "/root/segments/" + segment_name({kForger, 0})) << "short";
  write_journal(journals(), 10'000, [](Record& record, uint64_t n) {
    if (n == 0) {
      record.type = RecordType::open_segment;
      record.where.bytes = 1ull << 60;
    } else {
      record.where.offset = n << 40;
      record.where.bytes = n % 3 == 0 ? 1ull << 60 : kPageBytes;
    }
    record.key.bytes[0] = static_cast<uint8_t>(n);
    record.key.bytes[1] = static_cast<uint8_t>(n >> 8);
  });
  replay();
  EXPECT_EQ(catalog_.entries(), 8u) << "extents behind the end of their file";
  expect_served();
  // A writer opens, takes the dead forger's journal over and seals what it left.
  const auto depot = open();
  ASSERT_TRUE(depot->attach(cache_.paged()));
  EXPECT_EQ(depot->longest_prefix(keys_, std::vector{want_}), 8u);
}

TEST_P(HostileJournal, MayNameAnyNumberOfExtentsAndAsManyAreIndexedAsTheirFileCanHold) {
  store_honestly();
  const std::string path = directory_.path() + "/root/segments/" + segment_name({kForger, 0});
  {
    std::ofstream created(path);
  }
  std::filesystem::resize_file(path, 1 << 20);
  const uint64_t empty = Catalog(segments_).memory_bytes();
  write_journal(journals(), 200'000, [](Record& record, uint64_t n) {
    record.where.offset = n % 256 * kPageBytes;
    std::memcpy(record.key.bytes.data(), &n, sizeof n);
    record.key.bytes[7] = static_cast<uint8_t>(n);  // spread over the shards
  });
  replay();
  EXPECT_EQ(catalog_.entries(), 8u + (1 << 20) / 8192);
  EXPECT_EQ(catalog_.memory_bytes(), empty);
  expect_served();
}

INSTANTIATE_TEST_SUITE_P(Roots, HostileJournal, ::testing::Values("tmpfs", "disk"),
                         [](const auto& suite) { return suite.param; });

// Salts make other keys. What a look-up of one tenant does must then not depend on what others have stored,
// or its cost would tell: it asks for its own first key and stops.
TEST(Tenants, LookUpsOfOneProbeAsManyKeysWhateverTheOtherHasStored) {
  NamespaceDigest ns;
  ns.bytes.fill(7);
  std::vector<uint32_t> tokens(64 * kChunkTokens);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<uint32_t>(i);
  const auto keys_with = [&](std::string_view salt) {
    KeyChain chain(ns, kChunkTokens, salt);
    chain.append(tokens);
    return std::vector<Key>(chain.keys().begin(), chain.keys().end());
  };
  SegmentTable segments;
  Catalog catalog(segments);
  const uint32_t slot = segments.slot_of({1, 0});
  segments.set_present(slot, 0, 1 << 30);
  const auto part = catalog.part_id({0, LayoutKind::canonical, {0, 1, 0, 1}, kChunkTokens});
  ASSERT_TRUE(part);
  const auto secret = keys_with("alice");
  const auto curious = keys_with("mallory");
  // Keys asked for before the look-up ended.
  const auto probed = [&](const std::vector<Key>& keys) {
    std::vector<uint8_t> present(keys.size());
    return catalog.count_present(keys, *part, present, true);
  };
  for (size_t stored = 0; stored < secret.size(); ++stored) {
    EXPECT_EQ(probed(curious), 0u) << "with " << stored << " chunks of the same prompt by another tenant";
    EXPECT_EQ(probed(secret), stored) << "or nothing would be measured";
    catalog.put(secret[stored], *part, slot, {{1, 0}, stored * kPageBytes, kPageBytes});
  }
}

}  // namespace
}  // namespace tokendepot::testing
