// Stores into a first root that may be lost: written through to the next one, or copied there within a bound.
#include <filesystem>
#include <fstream>

#include "depot_fixture.h"
#include "store/journal_file.h"

namespace tokendepot::testing {
namespace {

namespace fs = std::filesystem;
constexpr uint64_t kMiB = 1 << 20;
constexpr uint32_t kBlocks = 64;
constexpr size_t kChunks = 8;  // of 68 KiB; a segment holds 15

class WriteThroughTest : public ::testing::Test {
 protected:
  WriteThroughTest() : memory_("/dev/shm"), disk_("/tmp"), cache_(small_shape(), kBlocks) {
    options_.roots = {{.path = memory_ / "root", .capacity_bytes = 16 * kMiB, .segment_bytes = kMiB},
                      {.path = disk_ / "root",
                       .capacity_bytes = 64 * kMiB,
                       .segment_bytes = kMiB,
                       .io = IoChoice::threads}};
    options_.roots[0].write_through = true;
    options_.slab_bytes = 8 * kMiB;
    options_.poll_ms = 20;
    options_.free_space_reserve = 0;
  }
  std::unique_ptr<Depot> open() { return open_attached(options_, ns_, cache_); }
  std::vector<Key> keys(uint32_t prompt) const { return prompt_keys(ns_, prompt, kChunks); }
  uint32_t store(Depot& depot, uint32_t prompt, size_t chunks = kChunks) {
    cache_.fill(prompt);
    return store_chunks(depot, ++job_, ns_, keys(prompt), 0, chunks).items_ok;
  }
  size_t found(Depot& depot, uint32_t prompt) {
    return depot.longest_prefix(keys(prompt), std::vector{want_of(small_shape())});
  }
  void expect_served(Depot& depot, uint32_t prompt, size_t chunks = kChunks) {
    const auto plan = plan_chunks(depot, ns_, keys(prompt), want_of(small_shape()), 0, chunks, 0);
    ASSERT_TRUE(plan) << prompt;
    cache_.clear();
    ASSERT_TRUE(depot.submit_load(++job_, *plan));
    EXPECT_EQ(wait_for(depot, job_).items_ok, chunks) << prompt;
    HostCache expected(small_shape(), kBlocks);
    expected.fill(prompt);
    for (int32_t b = 0; b < static_cast<int32_t>(chunks * kBlocksPerChunk); ++b)
      ASSERT_EQ(cache_.block(b), expected.block(b)) << prompt;
  }
  void lose_memory() { fs::remove_all(memory_ / "root"); }
  /// No file can be made in the next root, and none renamed into it.
  void break_disk() {
    fs::rename(disk_ / "root/segments", disk_ / "root/segments-away");
    std::ofstream(disk_ / "root/segments") << "not a directory";
  }
  void mend_disk() {
    fs::remove(disk_ / "root/segments");
    fs::rename(disk_ / "root/segments-away", disk_ / "root/segments");
  }

  TemporaryDirectory memory_;
  TemporaryDirectory disk_;
  HostCache cache_;
  Options options_;
  NamespaceDigest ns_;
  uint64_t job_ = 0;
};

TEST_F(WriteThroughTest, AStoreThatIsDoneOutlivesTheFirstRoot) {
  {
    auto depot = open();
    for (uint32_t prompt = 0; prompt < 5; ++prompt) ASSERT_EQ(store(*depot, prompt), kChunks);
    const RootStats first = depot->stats().roots[0];
    EXPECT_EQ(first.demotion_lag_bytes, 0u);
    EXPECT_EQ(first.demotion_lag_ns, 0u);
    EXPECT_EQ(depot->stats().drops.next_root, 0u);
    for (uint32_t prompt = 0; prompt < 5; ++prompt) expect_served(*depot, prompt);
    EXPECT_GT(depot->stats().load.by_path.mapped, 0u);
    EXPECT_EQ(depot->stats().load.by_path.direct + depot->stats().load.by_path.buffered, 0u)
        << "and the first root serves it while it lives";
  }
  lose_memory();
  auto depot = open();
  for (uint32_t prompt = 0; prompt < 5; ++prompt) expect_served(*depot, prompt);
}

TEST_F(WriteThroughTest, WithoutItAHalfFilledSegmentIsLostWithTheFirstRoot) {
  options_.roots[0].write_through = false;
  {
    auto depot = open();
    ASSERT_EQ(store(*depot, 0), kChunks);
    const RootStats first = depot->stats().roots[0];
    EXPECT_GE(first.demotion_lag_bytes, kChunks * 64 * 1024);
    EXPECT_GT(first.demotion_lag_ns, 0u);
  }
  lose_memory();
  auto depot = open();
  EXPECT_EQ(found(*depot, 0), 0u);
}

TEST_F(WriteThroughTest, WhatTheNextRootDoesNotTakeIsReportedAndServedByTheFirst) {
  auto depot = open();
  break_disk();
  EXPECT_EQ(store(*depot, 0, 3), 0u);
  EXPECT_EQ(depot->stats().drops.next_root, 3u);
  EXPECT_EQ(depot->stats().store.failures.dropped, 3u);
  EXPECT_GT(depot->stats().roots[0].demotion_lag_bytes, 0u);
  EXPECT_EQ(found(*depot, 0), 3u);
  expect_served(*depot, 0, 3);
  mend_disk();
  EXPECT_EQ(store(*depot, 1), kChunks) << "and it goes on when the root is back";
}

TEST_F(WriteThroughTest, AFullNextRootIsWaitedFor) {
  options_.roots[0].capacity_bytes = 64 * kMiB;
  options_.roots[1].capacity_bytes = 8 * kMiB;
  options_.eviction_grace_ms = 200;
  auto depot = open();
  for (uint32_t prompt = 0; prompt < 40; ++prompt) EXPECT_EQ(store(*depot, prompt), kChunks) << prompt;
  EXPECT_GT(depot->stats().roots[1].evicted_segments, 0u);
}

TEST_F(WriteThroughTest, ACopyThatStoresPassedThroughToIsBroughtToItsEnd) {
  {
    auto depot = open();
    ASSERT_EQ(store(*depot, 0, 3), 3u);
  }
  // Its segment is filled on without passing through.
  options_.roots[0].write_through = false;
  {
    auto depot = open();
    for (uint32_t prompt = 1; prompt < 4; ++prompt) ASSERT_EQ(store(*depot, prompt), kChunks);
    for (int i = 0; i < 300 && depot->stats().roots[0].demoted_segments == 0; ++i) usleep(100'000);
    EXPECT_GT(depot->stats().roots[0].demoted_segments, 0u);
  }
  lose_memory();
  auto depot = open();
  expect_served(*depot, 0, 3);
  expect_served(*depot, 1);
}

TEST_F(WriteThroughTest, WhatACopyLacksIsLoadedFromTheEvictedFileWhileThatIsThere) {
  {
    auto depot = open();
    ASSERT_EQ(store(*depot, 0, 3), 3u);
  }
  options_.roots[0].write_through = false;
  auto depot = open();
  ASSERT_EQ(store(*depot, 1), kChunks);
  const auto plan = plan_chunks(*depot, ns_, keys(1), want_of(small_shape()), 0, kChunks, 0);
  ASSERT_TRUE(plan);
  auto journal = JournalWriter::create(memory_ / "root/journals");
  ASSERT_TRUE(journal);
  Record evicted;
  evicted.type = RecordType::condemn_segment;
  evicted.where.segment = plan->items[0].where.segment;
  ASSERT_TRUE(journal->append(evicted));
  depot->refresh();
  cache_.clear();
  ASSERT_TRUE(depot->submit_load(++job_, *plan));
  EXPECT_EQ(wait_for(*depot, job_).items_ok, kChunks);
  HostCache expected(small_shape(), kBlocks);
  expected.fill(1);
  for (int32_t b = 0; b < static_cast<int32_t>(kChunks * kBlocksPerChunk); ++b)
    ASSERT_EQ(cache_.block(b), expected.block(b));
}

TEST_F(WriteThroughTest, WhereItCannotWorkTheDepotDoesNotOpen) {
  options_.roots[0].write_through = false;
  options_.roots[1].write_through = true;
  const auto refused = Depot::open(options_);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::invalid_argument);
  EXPECT_NE(refused.error().message.find("another one that can be written after it"), std::string::npos);
}

TEST_F(WriteThroughTest, StoresAreDroppedBeforeTheLagExceedsItsBound) {
  options_.roots[0].write_through = false;
  options_.roots[0].demotion_lag_bytes = 4 * kMiB;
  auto depot = open();
  break_disk();
  uint32_t stored = 0;
  for (uint32_t prompt = 0; prompt < 30; ++prompt) {
    StorePlan plan;
    plan.ns = ns_;
    const auto here = keys(prompt);
    for (uint32_t i = 0; i < kChunks; ++i)
      plan.items.push_back(
          {here[i], i, 0, iota_blocks(static_cast<int32_t>(i * kBlocksPerChunk), kBlocksPerChunk)});
    ASSERT_TRUE(depot->submit_store(++job_, plan));
    usleep(10'000);
    EXPECT_LE(depot->stats().roots[0].demotion_lag_bytes, 4 * kMiB);
    for (const Completion& done : depot->poll()) stored += done.items_ok;
  }
  EXPECT_GE(stored, 2 * kChunks) << "up to the bound they are taken";
  EXPECT_LT(stored, 30 * kChunks);
  EXPECT_EQ(depot->stats().roots[0].evicted_segments, 0u) << "and nothing is given up for them";
  EXPECT_GT(depot->stats().drops.no_space, 0u);
  mend_disk();
  until_stored([&] { return store(*depot, 30) == kChunks; });
  EXPECT_EQ(found(*depot, 30), kChunks) << "and they go on when the copies do";
  EXPECT_GT(depot->stats().roots[0].demoted_segments, 0u);
}

}  // namespace
}  // namespace tokendepot::testing
