// Two roots, and what a crash leaves in one.
#include <fstream>

#include "depot_fixture.h"
#include "store/journal_file.h"
#include "store/replay.h"
#include "store/root_writer.h"

namespace tokendepot::testing {
namespace {

constexpr uint32_t kBlocks = 512;

class TiersTest : public ::testing::Test {
 protected:
  TiersTest() : memory_("/dev/shm"), disk_("/tmp"), cache_(small_shape(), kBlocks) {}

  Options options() {
    Options options;
    options.roots = {{.path = memory_.path() + "/root", .capacity_bytes = 4 << 20, .segment_bytes = 1 << 20},
                     {.path = disk_.path() + "/root",
                      .capacity_bytes = 64 << 20,
                      .segment_bytes = 1 << 20,
                      .io = IoChoice::threads}};
    options.slab_bytes = 8 << 20;
    options.poll_ms = 20;
    options.free_space_reserve = 0;
    options.eviction_grace_ms = 0;
    return options;
  }
  std::unique_ptr<Depot> open(const Options& with) { return open_attached(with, ns_, cache_); }
  static size_t files(const std::string& directory) {
    return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(directory), {}));
  }
  TemporaryDirectory memory_;
  TemporaryDirectory disk_;
  HostCache cache_;
  NamespaceDigest ns_;
};

TEST_F(TiersTest, WhatLeavesMemoryIsServedFromTheDiskByteForByte) {
  auto depot = open(options());
  const auto want = want_of(small_shape());
  uint64_t job = 1;
  for (uint32_t prompt = 0; prompt < 24; ++prompt) {
    cache_.fill(prompt);
    store_until_all_are(*depot, job, ns_, prompt_keys(ns_, prompt, 8), 0, 8);
  }
  const DepotStats stats = depot->stats();
  EXPECT_GT(stats.roots[0].evicted_segments, 0u);
  EXPECT_GT(stats.roots[0].demoted_segments, 0u);
  for (uint32_t prompt = 0; prompt < 24; ++prompt) {
    const auto keys = prompt_keys(ns_, prompt, 8);
    ASSERT_EQ(depot->longest_prefix(keys, std::vector{want}), 8u) << prompt;
    HostCache expected(small_shape(), kBlocks);
    expected.fill(prompt);
    cache_.clear();
    const auto plan = plan_chunks(*depot, ns_, keys, want, 0, 8, 0);
    ASSERT_TRUE(plan);
    ASSERT_TRUE(depot->submit_load(job, *plan));
    ASSERT_EQ(wait_for(*depot, job++).items_ok, 8u) << prompt;
    for (int32_t b = 0; b < 32; ++b) ASSERT_EQ(cache_.block(b), expected.block(b));
  }
}

TEST_F(TiersTest, AfterMemoryIsLostTheDiskServesWhatWasDemoted) {
  const auto want = std::vector{want_of(small_shape())};
  {
    auto depot = open(options());
    uint64_t job = 1;
    for (uint32_t prompt = 0; prompt < 4; ++prompt) {
      cache_.fill(prompt);
      store_until_all_are(*depot, job, ns_, prompt_keys(ns_, prompt, 8), 0, 8);
    }
    for (int i = 0; i < 300 && depot->stats().roots[0].demoted_segments == 0; ++i) usleep(100'000);
    EXPECT_GT(depot->stats().roots[0].demoted_segments, 0u);
  }
  std::filesystem::remove_all(memory_.path() + "/root");  // a reboot
  auto depot = open(options());
  EXPECT_EQ(depot->longest_prefix(prompt_keys(ns_, 0, 8), want), 8u);
}

TEST_F(TiersTest, ADamagedCopyInMemoryFallsBackToTheDisk) {
  Options loads_only = options();
  loads_only.scrub_bytes_per_second = 0;  // it would condemn the damage before the load meets it
  auto depot = open(loads_only);
  const auto want = want_of(small_shape());
  uint64_t job = 1;
  for (uint32_t prompt = 0; prompt < 3; ++prompt) {
    cache_.fill(prompt);
    store_until_all_are(*depot, job, ns_, prompt_keys(ns_, prompt, 8), 0, 8);
  }
  for (int i = 0; i < 300 && depot->stats().roots[0].demoted_segments == 0; ++i) usleep(100'000);
  for (const auto& entry : std::filesystem::directory_iterator(memory_.path() + "/root/segments")) {
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(4096 + 77);
    file.put('\x55');
  }
  cache_.clear();
  const auto keys = prompt_keys(ns_, 0, 8);
  const auto plan = plan_chunks(*depot, ns_, keys, want, 0, 8, 0);
  ASSERT_TRUE(plan);
  ASSERT_TRUE(depot->submit_load(job, *plan));
  EXPECT_EQ(wait_for(*depot, job).items_ok, 8u);
  HostCache expected(small_shape(), kBlocks);
  expected.fill(0);
  for (int32_t b = 0; b < 32; ++b) ASSERT_EQ(cache_.block(b), expected.block(b));
}

TEST_F(TiersTest, ExtentsWithoutAJournalRecordAreFoundByTheirHeaders) {
  const auto want = std::vector{want_of(small_shape())};
  Options one = options();
  one.roots.resize(1);
  one.device_threads = 1;  // records in the order of the extents
  {
    auto depot = open(one);
    cache_.fill(1);
    ASSERT_EQ(store_chunks(*depot, 1, ns_, prompt_keys(ns_, 1, 6), 0, 6).items_ok, 6u);
  }
  // The crash came between the last two extents' bytes and their records.
  for (const auto& entry : std::filesystem::directory_iterator(memory_.path() + "/root/journals")) {
    std::filesystem::resize_file(entry.path(), std::filesystem::file_size(entry.path()) - 2 * kRecordBytes);
  }
  auto depot = open(one);
  EXPECT_EQ(depot->longest_prefix(prompt_keys(ns_, 1, 6), want), 6u);
  cache_.fill(2);
  EXPECT_EQ(store_chunks(*depot, 2, ns_, prompt_keys(ns_, 2, 6), 0, 6).items_ok, 6u)
      << "and the segment goes on behind them";
  EXPECT_EQ(depot->longest_prefix(prompt_keys(ns_, 1, 6), want), 6u);
}

TEST_F(TiersTest, ATornExtentIsNotRecovered) {
  Options one = options();
  one.roots.resize(1);
  one.device_threads = 1;  // records in the order of the extents
  const auto want = std::vector{want_of(small_shape())};
  uint64_t last_extent = 0;
  {
    auto depot = open(one);
    cache_.fill(1);
    const auto keys = prompt_keys(ns_, 1, 6);
    ASSERT_EQ(store_chunks(*depot, 1, ns_, keys, 0, 6).items_ok, 6u);
    const auto plan = plan_chunks(*depot, ns_, keys, want[0], 0, 6, 0);
    for (const LoadItem& item : plan->items) last_extent = std::max(last_extent, item.where.offset);
  }
  for (const auto& entry : std::filesystem::directory_iterator(memory_.path() + "/root/journals")) {
    std::filesystem::resize_file(entry.path(), std::filesystem::file_size(entry.path()) - kRecordBytes);
  }
  for (const auto& entry : std::filesystem::directory_iterator(memory_.path() + "/root/segments")) {
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(last_extent + 4096 + 5000));
    file.put('\x55');
  }
  auto depot = open(one);
  EXPECT_EQ(depot->longest_prefix(prompt_keys(ns_, 1, 6), want), 5u);
}

TEST_F(TiersTest, RestartsLeaveNoOrphansAndOneJournal) {
  Options one = options();
  one.roots.resize(1);
  for (uint32_t round = 0; round < 10; ++round) {
    auto depot = open(one);
    cache_.fill(round);
    EXPECT_EQ(store_chunks(*depot, 1, ns_, prompt_keys(ns_, round, 2), 0, 2).items_ok, 2u);
  }
  EXPECT_EQ(files(memory_.path() + "/root/journals"), 1u);
  EXPECT_LE(files(memory_.path() + "/root/segments"), 3u) << "one that fills, one ready, perhaps one sealed";
}

TEST_F(TiersTest, FilesThatADeadProcessHadBegunAreRemovedAndThoseOfALiveOneStay) {
  const std::string root = memory_.path() + "/root";
  Options one = options();
  one.roots.resize(1);
  open(one).reset();
  const std::string of_a_manifest = root + "/manifests/.tmp-0000000000000001";
  const std::string of_notes = root + "/.tmp-0000000000000002";
  std::ofstream(of_a_manifest) << "half a manifest";
  std::ofstream(of_notes) << "half a note";
  auto opened_root = Root::open(one.roots[0], 0, one);
  ASSERT_TRUE(opened_root);
  SegmentTable segments;
  Replay replay(**opened_root, segments, nullptr);
  ASSERT_TRUE(replay.first());
  auto writer = RootWriter::open(**opened_root, replay, segments, system_clock(), 0);
  ASSERT_TRUE(writer);
  (*writer)->remove_unfinished();
  EXPECT_TRUE(std::filesystem::exists(of_a_manifest));  // it may be about to be renamed
  const std::string begun_since = root + "/manifests/.tmp-0000000000000003";
  std::ofstream(begun_since) << "half a manifest";
  (*writer)->remove_unfinished();
  EXPECT_FALSE(std::filesystem::exists(of_a_manifest));
  EXPECT_FALSE(std::filesystem::exists(of_notes));
  EXPECT_TRUE(std::filesystem::exists(begun_since));
}

TEST_F(TiersTest, LeftoversOfDeadWritersAreSealedAndRemoved) {
  const std::string root = memory_.path() + "/root";
  Options one = options();
  one.roots.resize(1);
  // Two writers die with half-filled segments and spares; one survivor tidies up after both.
  {
    auto a = open(one);
    HostCache second(small_shape(), kBlocks);
    auto b = Depot::open(one);
    ASSERT_TRUE(b);
    ASSERT_TRUE((*b)->attach(second.paged()));
    cache_.fill(1);
    second.fill(2);
    ASSERT_EQ(store_chunks(*a, 1, ns_, prompt_keys(ns_, 1, 2), 0, 2).items_ok, 2u);
    ASSERT_EQ(store_chunks(**b, 1, ns_, prompt_keys(ns_, 2, 2), 0, 2).items_ok, 2u);
  }
  ASSERT_EQ(files(root + "/journals"), 2u);
  std::ofstream(root + "/segments/.tmp-0000000000000001-00000000.seg") << "half a copy";
  std::ofstream(root + "/segments/notes.txt") << "somebody else's";
  Options writer_options = one;
  auto opened_root = Root::open(writer_options.roots[0], 0, writer_options);
  ASSERT_TRUE(opened_root);
  SegmentTable segments;
  Replay replay(**opened_root, segments, nullptr);
  ASSERT_TRUE(replay.first());
  auto writer = RootWriter::open(**opened_root, replay, segments, system_clock(), 0);
  ASSERT_TRUE(writer);
  EXPECT_EQ((*writer)->tend_dead_writers(), 1u);
  (*writer)->remove_orphans();
  size_t sealed = 0;
  for (const auto& [slot, segment] : segments.present_segments(0)) sealed += segment.roots[0].sealed ? 1 : 0;
  EXPECT_EQ(sealed, 1u);
  EXPECT_FALSE(std::filesystem::exists(root + "/segments/.tmp-0000000000000001-00000000.seg"));
  EXPECT_TRUE(std::filesystem::exists(root + "/segments/notes.txt")) << "foreign files are left alone";
  (*writer).reset();
  auto depot = open(one);
  const auto want = std::vector{want_of(small_shape())};
  EXPECT_EQ(depot->longest_prefix(prompt_keys(ns_, 1, 2), want), 2u);
  EXPECT_EQ(depot->longest_prefix(prompt_keys(ns_, 2, 2), want), 2u);
}

TEST_F(TiersTest, AStaleJournalIsCompactedAndNothingAliveIsForgotten) {
  Options one = options();
  one.roots.resize(1);
  auto opened_root = Root::open(one.roots[0], 0, one);
  ASSERT_TRUE(opened_root);
  SegmentTable segments;
  Catalog catalog(segments);
  Replay replay(**opened_root, segments, &catalog);
  ASSERT_TRUE(replay.first());
  auto writer = RootWriter::open(**opened_root, replay, segments, system_clock(), 0);
  ASSERT_TRUE(writer);
  Record put;
  put.part = {0, 1, 0, 1};
  put.tokens = 16;
  const PartId part = *catalog.part_id({0, LayoutKind::canonical, put.part, 16});
  std::vector<Key> keys;
  for (uint32_t n = 0; n < 40'000; ++n) {
    Key key;
    std::mt19937_64 random(n);
    for (size_t i = 0; i < 4; ++i) {
      const uint64_t value = random();
      std::memcpy(key.bytes.data() + 8 * i, &value, 8);
    }
    keys.push_back(key);
    put.key = key;
    if ((*writer)->wants_spare()) {
      ASSERT_TRUE((*writer)->prepare_spare(nullptr));
    }
    auto place = (*writer)->reserve(2 * kPageBytes);
    ASSERT_TRUE(place);
    ASSERT_TRUE((*writer)->acknowledge(*place, put));
  }
  const uint64_t before = (*writer)->writer_id();
  (*writer)->compact_journal();
  EXPECT_NE((*writer)->writer_id(), before) << "40,000 records of which most are gone";
  EXPECT_EQ(files(memory_.path() + "/root/journals"), 1u);
  EXPECT_LT(std::filesystem::file_size(
                std::filesystem::directory_iterator(memory_.path() + "/root/journals")->path()),
            40'000u * kRecordBytes / 2);
  SegmentTable fresh_segments;
  Catalog fresh(fresh_segments);
  const PartId fresh_part = *fresh.part_id({0, LayoutKind::canonical, put.part, 16});
  Replay again(**opened_root, fresh_segments, &fresh);
  ASSERT_TRUE(again.first());
  size_t alive = 0;
  for (const Key& key : keys) {
    const bool here = catalog.find(key, part).has_value();
    alive += here ? 1 : 0;
    ASSERT_EQ(here, fresh.find(key, fresh_part).has_value());
  }
  EXPECT_GT(alive, 0u);
}

}  // namespace
}  // namespace tokendepot::testing
