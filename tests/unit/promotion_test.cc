// What is loaded from the lower root comes from memory the next time, without cost to the lower root.
#include <algorithm>
#include <fstream>

#include "depot_fixture.h"
#include "open_depot.h"
#include "store/journal_file.h"
#include "tokendepot/tools.h"

namespace tokendepot::testing {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr size_t kChunks = 12;  // a chunk takes 68 KiB, a segment 15 of them

class PromotionTest : public ::testing::Test {
 protected:
  PromotionTest() : memory_("/dev/shm"), disk_("/tmp"), cache_(small_shape(), 64) {}

  Options options(uint64_t memory = 8 * kMiB) {
    Options options;
    options.roots = {{.path = memory_.path() + "/root", .capacity_bytes = memory, .segment_bytes = kMiB},
                     {.path = disk_.path() + "/root",
                      .capacity_bytes = 64 * kMiB,
                      .segment_bytes = kMiB,
                      .io = IoChoice::threads}};
    options.slab_bytes = 8 << 20;
    options.poll_ms = 20;
    options.free_space_reserve = 0;
    options.scrub_bytes_per_second = 0;  // it would find the damage before the copying does
    options.eviction_grace_ms = 0;
    return options;
  }
  std::unique_ptr<Depot> open(const Options& with) { return open_attached(with, ns_, cache_); }
  std::vector<Key> keys(uint32_t prompt) const { return prompt_keys(ns_, prompt, kChunks); }
  void store(Depot& depot, uint32_t prompt) {
    cache_.fill(prompt);
    until_stored(
        [&] { return store_chunks(depot, ++job_, ns_, keys(prompt), 0, kChunks).items_ok == kChunks; });
  }
  /// Loads the prompt, checks every byte, and returns the bytes that came from memory.
  uint64_t load(Depot& depot, uint32_t prompt, size_t chunks = kChunks) {
    const auto plan = plan_chunks(depot, ns_, keys(prompt), want_of(small_shape()), 0, chunks, 0);
    EXPECT_TRUE(plan) << prompt;
    if (!plan) return 0;
    const uint64_t before = depot.stats().load.by_path.mapped;
    cache_.clear();
    EXPECT_TRUE(depot.submit_load(++job_, *plan));
    EXPECT_EQ(wait_for(depot, job_).items_ok, chunks) << prompt;
    HostCache expected(small_shape(), 64);
    expected.fill(prompt);
    for (int32_t b = 0; b < static_cast<int32_t>(chunks * kBlocksPerChunk); ++b)
      EXPECT_EQ(cache_.block(b), expected.block(b)) << prompt;
    return depot.stats().load.by_path.mapped - before;
  }
  /// Stores prompts [0, count), the first of which are in the disk's root alone afterwards.
  void store_more_than_memory(Depot& depot, uint32_t count = 16) {
    for (uint32_t prompt = 0; prompt < count; ++prompt) store(depot, prompt);
    await_demotion(depot);
  }
  /// Until nothing but the segment that is being filled is missing below.
  static void await_demotion(Depot& depot) {
    EXPECT_TRUE(await([&] { return depot.stats().roots[0].demotion_lag_bytes <= kMiB; }));
  }
  template <typename Condition>
  static bool await(Condition condition) {
    for (int i = 0; i < 1000; ++i) {
      if (condition()) return true;
      usleep(10'000);
    }
    return false;
  }

  TemporaryDirectory memory_;
  TemporaryDirectory disk_;
  HostCache cache_;
  NamespaceDigest ns_;
  uint64_t job_ = 0;
};

constexpr uint64_t kExtent = 68 << 10;

TEST_F(PromotionTest, WhatIsLoadedFromTheDiskTwiceInARowComesFromMemoryTheThirdTime) {
  auto depot = open(options());
  store_more_than_memory(*depot);
  ASSERT_EQ(load(*depot, 0), 0u) << "evicted from memory";
  load(*depot, 0);
  ASSERT_TRUE(await([&] { return depot->stats().roots[0].promoted_extents >= kChunks; }));
  depot->refresh();
  EXPECT_EQ(load(*depot, 0), kChunks * kExtent);
  EXPECT_EQ(depot->stats().roots[0].promoted_extents, kChunks) << "once, however often it was asked for";
}

TEST_F(PromotionTest, CopiesAreNotDemotedAndTheirEvictionCostsNoHit) {
  auto depot = open(options());
  store_more_than_memory(*depot);
  for (const uint32_t prompt : {0, 1, 0, 1}) load(*depot, prompt);
  // Two prompts: the segment of copies that holds the first one is full.
  ASSERT_TRUE(await([&] { return depot->stats().roots[0].promoted_extents >= 2 * kChunks; }));
  for (uint32_t prompt = 16; prompt < 32; ++prompt) store(*depot, prompt);
  await_demotion(*depot);
  EXPECT_EQ(depot->longest_prefix(keys(0), std::vector{want_of(small_shape())}), kChunks);
  EXPECT_EQ(load(*depot, 0), 0u) << "from the original, byte for byte";
  const auto below = list_extents(disk_.path() + "/root");
  ASSERT_TRUE(below);
  EXPECT_LE(below->size(), 32 * kChunks) << "a copy is no second extent down there";
}

TEST_F(PromotionTest, WhatIsColderThanEverythingInMemoryStaysBelow) {
  auto depot = open(options());
  store_more_than_memory(*depot);
  // Each is loaded once only, and was stored before anything that memory holds was used.
  for (uint32_t prompt = 0; prompt < 6; ++prompt) load(*depot, prompt);
  usleep(2'500'000);  // two rounds of the keeper
  EXPECT_EQ(depot->stats().roots[0].promoted_extents, 0u);
}

TEST_F(PromotionTest, FreeMemoryTakesWhatIsLoadedOnce) {
  {
    auto depot = open(options());
    store_more_than_memory(*depot);
  }
  std::filesystem::remove_all(memory_.path() + "/root");  // a reboot
  auto depot = open(options());
  EXPECT_EQ(load(*depot, 0), 0u);
  ASSERT_TRUE(await([&] { return depot->stats().roots[0].promoted_extents >= kChunks; }));
  depot->refresh();
  EXPECT_EQ(load(*depot, 0), kChunks * kExtent);
}

TEST_F(PromotionTest, AfterARestartCopiesServeAndAreStillNotDemoted) {
  {
    auto depot = open(options());
    store_more_than_memory(*depot);
    load(*depot, 0);
    load(*depot, 0);
    ASSERT_TRUE(await([&] { return depot->stats().roots[0].promoted_extents >= kChunks; }));
  }
  auto depot = open(options());
  EXPECT_EQ(load(*depot, 0), kChunks * kExtent);
  const uint64_t below = depot->stats().roots[1].segments;
  store(*depot, 40);  // into a segment of its own, not behind the copies
  usleep(2'500'000);
  EXPECT_LE(depot->stats().roots[1].segments, below + 1);
  EXPECT_EQ(depot->stats().roots[0].demoted_segments, depot->stats().roots[1].segments - below);
}

TEST_F(PromotionTest, ADamagedOriginalIsNotCarriedOn) {
  {
    auto depot = open(options());
    store_more_than_memory(*depot);
  }
  std::filesystem::remove_all(memory_.path() + "/root");
  auto depot = open(options());
  load(*depot, 0, 1);
  // The first extent of every segment changes between the load and its copy.
  for (const auto& entry : std::filesystem::directory_iterator(disk_.path() + "/root/segments")) {
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(4096 + 77);
    file.put('\x55');
  }
  usleep(2'500'000);
  depot->refresh();
  const auto copies = list_extents(memory_.path() + "/root");
  ASSERT_TRUE(copies);
  for (const StoredExtent& copy : *copies)
    EXPECT_TRUE(verify_extent(memory_.path() + "/root", copy)) << "copied before the damage or not at all";
  if (copies->empty()) {
    EXPECT_EQ(depot->longest_prefix(keys(0), std::vector{want_of(small_shape())}), 0u)
        << "condemned, and no copy of it";
  }
}

TEST_F(PromotionTest, ACopyIsAsOldAsItsOriginal) {
  {
    auto depot = open(options());
    store_more_than_memory(*depot);
  }
  std::filesystem::remove_all(memory_.path() + "/root");
  auto depot = open(options());
  load(*depot, 0);
  ASSERT_TRUE(await([&] { return depot->stats().roots[0].promoted_extents >= kChunks; }));
  const auto below = list_extents(disk_.path() + "/root");
  const auto copies = list_extents(memory_.path() + "/root");
  ASSERT_TRUE(below && copies);
  for (const StoredExtent& copy : *copies) {
    const auto original = std::ranges::find(*below, copy.key, &StoredExtent::key);
    ASSERT_NE(original, below->end());
    EXPECT_EQ(copy.stored_at_ns, original->stored_at_ns) << "a time to live must not begin anew";
  }
}

TEST_F(PromotionTest, ForgottenExtentsAreNotPromoted) {
  {
    auto depot = open(options());
    store_more_than_memory(*depot);
  }
  std::filesystem::remove_all(memory_.path() + "/root");
  auto depot = open(options());
  load(*depot, 0);
  // Where the keeper was faster, its copies are forgotten like the rest.
  for (const std::string& root : {disk_.path() + "/root", memory_.path() + "/root"}) {
    const auto stored = list_extents(root);
    ASSERT_TRUE(stored);
    ASSERT_TRUE(remove_extents(root, *stored));
  }
  usleep(2'500'000);
  depot->refresh();
  EXPECT_EQ(depot->longest_prefix(keys(0), std::vector{want_of(small_shape())}), 0u);
}

}  // namespace
}  // namespace tokendepot::testing
