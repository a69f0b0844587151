// Hot extents outlive their segment where that is asked for, within its bound.
#include <fstream>

#include "depot_fixture.h"
#include "tokendepot/tools.h"

namespace tokendepot::testing {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr size_t kChunks = 8;  // of 68 KiB; a segment holds 15

class RewritingTest : public ::testing::Test {
 protected:
  RewritingTest() : directory_("/dev/shm"), cache_(small_shape(), 64) {}

  std::unique_ptr<Depot> open(uint32_t percent) {
    Options options;
    options.roots = {
        {.path = directory_.path() + "/root", .capacity_bytes = 8 * kMiB, .segment_bytes = kMiB}};
    options.free_space_reserve = 0;
    options.eviction_grace_ms = 0;
    options.rewrite_percent = percent;
    options.poll_ms = 20;
    return open_attached(options, ns_, cache_);
  }
  std::vector<Key> keys(uint32_t prompt) const { return prompt_keys(ns_, prompt, kChunks); }
  void store(Depot& depot, uint32_t prompt) {
    cache_.fill(prompt);
    until_stored(
        [&] { return store_chunks(depot, ++job_, ns_, keys(prompt), 0, kChunks).items_ok == kChunks; });
    // What is stored while the keeper makes room takes the room beside it.
    bool ready = false;  // what is rewritten may take it a moment later
    for (int i = 0; i < 10'000 && !(ready = next_segment_is_ready(depot)); ++i) usleep(1000);
    ASSERT_TRUE(ready);
  }
  static bool next_segment_is_ready(Depot& depot) {
    const RootStats root = depot.stats().roots[0];
    return root.used_bytes >= (root.segments + 1) * kMiB;
  }
  uint32_t load(Depot& depot, uint32_t prompt, size_t chunks) {
    const auto plan = plan_chunks(depot, ns_, keys(prompt), want_of(small_shape()), 0, chunks, 0);
    if (!plan) return 0;
    cache_.clear();
    EXPECT_TRUE(depot.submit_load(++job_, *plan));
    const uint32_t loaded = wait_for(depot, job_).items_ok;
    HostCache expected(small_shape(), 64);
    expected.fill(prompt);
    for (int32_t b = 0; b < static_cast<int32_t>(loaded * kBlocksPerChunk); ++b)
      EXPECT_EQ(cache_.block(b), expected.block(b)) << prompt;
    return loaded;
  }
  size_t found(Depot& depot, uint32_t prompt) {
    return depot.longest_prefix(keys(prompt), std::vector{want_of(small_shape())});
  }

  TemporaryDirectory directory_;
  HostCache cache_;
  NamespaceDigest ns_;
  uint64_t job_ = 0;
};

TEST_F(RewritingTest, WhatWasUsedOutlivesItsSegmentByteForByte) {
  auto depot = open(10);
  store(*depot, 0);
  ASSERT_EQ(load(*depot, 0, 3), 3u);
  for (uint32_t prompt = 1; prompt < 17; ++prompt) store(*depot, prompt);
  EXPECT_EQ(found(*depot, 0), 3u) << "and what was not used has gone";
  EXPECT_EQ(load(*depot, 0, 3), 3u);
  EXPECT_EQ(depot->stats().roots[0].rewritten_extents, 3u);
}

TEST_F(RewritingTest, WithoutTheOptionWholeSegmentsGo) {
  auto depot = open(0);
  store(*depot, 0);
  ASSERT_EQ(load(*depot, 0, 3), 3u);
  for (uint32_t prompt = 1; prompt < 17; ++prompt) store(*depot, prompt);
  EXPECT_EQ(found(*depot, 0), 0u);
  EXPECT_EQ(depot->stats().roots[0].rewritten_extents, 0u);
}

TEST_F(RewritingTest, NoMoreIsRewrittenThanItsShareOfWhatIsStored) {
  auto depot = open(5);
  for (uint32_t prompt = 0; prompt < 60; ++prompt) {
    store(*depot, prompt);
    (void)load(*depot, prompt, kChunks);  // everything is hot
  }
  const DepotStats stats = depot->stats();
  EXPECT_GT(stats.roots[0].rewritten_bytes, 0u);
  EXPECT_LE(stats.roots[0].rewritten_bytes, stats.store.bytes / 20);
}

TEST_F(RewritingTest, ADamagedExtentIsNotCarriedOn) {
  auto depot = open(10);
  store(*depot, 0);
  ASSERT_EQ(load(*depot, 0, 2), 2u);
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path() + "/root/segments")) {
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(4096 + 77);
    file.put('\x55');
  }
  for (uint32_t prompt = 1; prompt < 17; ++prompt) store(*depot, prompt);
  EXPECT_EQ(found(*depot, 0), 0u) << "the first is damaged";
  EXPECT_EQ(depot->stats().roots[0].rewritten_extents, 1u) << "the second is not";
}

TEST_F(RewritingTest, WhatWasForgottenIsNotCarriedOn) {
  auto depot = open(10);
  store(*depot, 0);
  ASSERT_EQ(load(*depot, 0, 3), 3u);
  const auto stored = list_extents(directory_.path() + "/root");
  ASSERT_TRUE(stored);
  ASSERT_TRUE(remove_extents(directory_.path() + "/root", *stored));
  depot->refresh();
  for (uint32_t prompt = 1; prompt < 17; ++prompt) store(*depot, prompt);
  EXPECT_EQ(found(*depot, 0), 0u);
  EXPECT_EQ(depot->stats().roots[0].rewritten_extents, 0u);
}

}  // namespace
}  // namespace tokendepot::testing
