// What explains a miss, what a depot counts for its metrics, and what a watcher of a root sees come and go.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "depot_fixture.h"
#include "format/extent.h"
#include "store/gone_keys.h"
#include "tokendepot/tools.h"
#include "tokendepot/watch.h"

namespace tokendepot::testing {
namespace {

Options options_of(const std::string& root) {
  Options options;
  options.roots.push_back({});
  options.roots[0].path = root;
  options.roots[0].capacity_bytes = 4 << 20;
  options.roots[0].segment_bytes = 1 << 20;
  options.free_space_reserve = 0;
  return options;
}

std::unique_ptr<Depot> open_at(const std::string& root) {
  auto depot = Depot::open(options_of(root));
  EXPECT_TRUE(depot) << depot.error().message;
  return std::move(*depot);
}

uint64_t total(const LatencyCounts& latency) {
  return std::accumulate(latency.counts.begin(), latency.counts.end(), uint64_t{0});
}

TEST(GoneKeys, HoldsWhatWasAddedAndMistakesFewOthersForIt) {
  GoneKeys gone;
  const auto word = [](uint64_t n) {  // splitmix64: as random as a SHA-256 for this purpose
    uint64_t x = (n + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
  };
  constexpr uint64_t kAdded = GoneKeys::kSlots / 8;
  for (uint64_t n = 0; n < kAdded; ++n) gone.add(word(n));
  uint64_t held = 0;
  for (uint64_t n = 0; n < kAdded; ++n) held += gone.holds(word(n));
  EXPECT_GT(held, kAdded * 92 / 100);  // (1 - exp(-1/8)) * 8 = 0.94 are in their place still
  uint64_t mistaken = 0;
  for (uint64_t n = 0; n < 1 << 20; ++n) mistaken += gone.holds(word(kAdded + n));
  EXPECT_LE(mistaken, 16u);  // expected: 2^20 x 0.12 / 65,535 = 1.9
}

TEST(LatencyCounts, PutsEachDurationBelowTheFirstBoundThatIsNotLess) {
  LatencyCounts counts;
  counts.add(0);
  counts.add(100'000);
  counts.add(100'001);
  counts.add(UINT64_MAX / 2);
  EXPECT_EQ(counts.counts.front(), 2u);
  EXPECT_EQ(counts.counts[1], 1u);
  EXPECT_EQ(counts.counts.back(), 1u);
}

TEST(MissHistory, TellsWhatNeverWasFromWhatIsStoredAndWhatHasGone) {
  const TemporaryDirectory directory("/dev/shm");
  const std::string root = directory.path() + "/root";
  auto depot = open_at(root);
  const NamespaceDigest ns = depot->register_namespace(R"({"model":"m"})").value();
  HostCache cache(small_shape(), 20 * kBlocksPerChunk);
  ASSERT_TRUE(depot->attach(cache.paged()));
  const auto keys = prompt_keys(ns, 1, 21);
  ASSERT_EQ(store_chunks(*depot, 1, ns, keys, 0, 20).items_ok, 20u);
  EXPECT_EQ(depot->history(keys[19]), KeyHistory::stored);
  EXPECT_EQ(depot->history(keys[20]), KeyHistory::never);
  auto extents = list_extents(root).value();
  std::erase_if(extents, [&](const StoredExtent& extent) { return extent.key != keys[2]; });
  ASSERT_EQ(remove_extents(root, extents).value(), 1u);
  depot->refresh();
  EXPECT_EQ(depot->history(keys[2]), KeyHistory::gone);
  depot.reset();
  ASSERT_GT(evict_segments(root, 4 << 20).value().segments, 0u);
  depot = open_at(root);  // what the journals say has gone is known after a restart, too
  EXPECT_EQ(depot->history(keys[0]), KeyHistory::gone);
  EXPECT_EQ(depot->history(keys[20]), KeyHistory::never);
}

TEST(DepotStats, TellRootsLatenciesAndWhyStoresWereDropped) {
  const TemporaryDirectory directory("/dev/shm");
  Options options = options_of(directory.path() + "/root");
  const uint64_t extent = extent_bytes(small_shape());
  options.store_queue_bytes = 3 * extent;
  auto opened = Depot::open(options);
  ASSERT_TRUE(opened) << opened.error().message;
  Depot& depot = **opened;
  const NamespaceDigest ns = depot.register_namespace(R"({"model":"m"})").value();
  HostCache cache(small_shape(), 16 * kBlocksPerChunk);
  ASSERT_TRUE(depot.attach(cache.paged()));
  const auto keys = prompt_keys(ns, 1, 8);
  const Completion stored = store_chunks(depot, 1, ns, keys, 0, 8);
  EXPECT_EQ(stored.failures.size(), 5u);
  const auto plan = plan_chunks(depot, ns, keys, want_of(small_shape()), 0, 3, 8 * kBlocksPerChunk);
  ASSERT_TRUE(plan) << plan.error().message;
  ASSERT_TRUE(depot.submit_load(2, *plan));
  ASSERT_EQ(wait_for(depot, 2).items_ok, 3u);

  const DepotStats stats = depot.stats();
  EXPECT_EQ(stats.drops.queue_full, 5u);
  EXPECT_EQ(stats.drops.no_space + stats.drops.late + stats.drops.no_root, 0u);
  for (const TransferStats* way : {&stats.load, &stats.store}) {
    EXPECT_EQ(total(way->latency), 3u);
    EXPECT_EQ(total(way->queue), 3u);
    EXPECT_LE(way->queue.nanoseconds, way->latency.nanoseconds);
    EXPECT_DOUBLE_EQ(way->tokens_by_path.mapped, 3.0 * kChunkTokens);
  }
  ASSERT_EQ(stats.roots.size(), 1u);
  const RootStats& root = stats.roots[0];
  EXPECT_EQ(root.id, inspect_root(root.path).value().root_id_hex);
  EXPECT_EQ(root.loaded.bytes, 3 * extent);
  EXPECT_EQ(root.stored.bytes, 3 * extent);
  EXPECT_DOUBLE_EQ(root.loaded.tokens, 3.0 * kChunkTokens);
  EXPECT_DOUBLE_EQ(root.stored.tokens, 3.0 * kChunkTokens);
  EXPECT_GT(root.written_bytes, root.stored.bytes);  // journal records
  EXPECT_EQ(root.evicted_bytes.capacity + root.evicted_bytes.corrupt, 0u);
}

TEST(DepotStats, TellHowLateOthersRecordsAreSeen) {
  const TemporaryDirectory directory("/dev/shm");
  Options reading = options_of(directory.path() + "/root");
  auto writer = open_at(directory.path() + "/root");
  const NamespaceDigest ns = writer->register_namespace(R"({"model":"m"})").value();
  HostCache cache(small_shape(), 8 * kBlocksPerChunk);
  ASSERT_TRUE(writer->attach(cache.paged()));
  const auto keys = prompt_keys(ns, 1, 8);
  ASSERT_EQ(store_chunks(*writer, 1, ns, keys, 0, 2).items_ok, 2u);
  reading.writer = false;
  auto reader = Depot::open(reading);
  ASSERT_TRUE(reader) << reader.error().message;
  EXPECT_EQ(total((*reader)->stats().roots[0].journal_lag), 0u);  // what was there before is no lag
  ASSERT_EQ(store_chunks(*writer, 2, ns, keys, 2, 5).items_ok, 3u);
  (*reader)->refresh();
  EXPECT_EQ(total((*reader)->stats().roots[0].journal_lag), 3u);
}

/// A worker of two, with half of the heads.
void store_half(const std::string& root, uint16_t half, std::span<const Key> keys,
                const NamespaceDigest& ns) {
  auto depot = open_at(root);
  const auto first = static_cast<uint16_t>(2 * half);
  HostCache cache(small_shape({0, 2, first, static_cast<uint16_t>(first + 2)}), 8 * kBlocksPerChunk);
  ASSERT_TRUE(depot->attach(cache.paged()));
  ASSERT_EQ(store_chunks(*depot, 1, ns, keys, 0, keys.size()).items_ok, keys.size());
}

TEST(RootWatch, AChunkIsThereWhenAllRanksHaveStoredTheirParts) {
  const TemporaryDirectory directory("/dev/shm");
  const std::string root = directory.path() + "/root";
  const NamespaceDigest ns = open_at(root)->register_namespace(R"({"model":"m"})").value();
  const auto keys = prompt_keys(ns, 1, 4);
  store_half(root, 1, std::span(keys).first(3), ns);
  auto watch = RootWatch::open(root);
  ASSERT_TRUE(watch) << watch.error().message;
  EXPECT_TRUE((*watch)->poll().value().empty());
  store_half(root, 0, std::span(keys).first(2), ns);
  const auto changes = (*watch)->poll().value();
  ASSERT_EQ(changes.size(), 2u);
  for (const ChunkChange& change : changes) {
    EXPECT_TRUE(change.stored);
    EXPECT_EQ(change.tokens, kChunkTokens);
    EXPECT_NE(std::find(keys.begin(), keys.begin() + 2, change.key), keys.begin() + 2);
  }
  auto extents = list_extents(root).value();
  std::erase_if(extents, [&](const StoredExtent& e) { return e.key != keys[1] || e.part.head_begin != 0; });
  ASSERT_EQ(remove_extents(root, extents).value(), 1u);
  const auto removed = (*watch)->poll().value();
  ASSERT_EQ(removed.size(), 1u);
  EXPECT_FALSE(removed[0].stored);
  EXPECT_EQ(removed[0].key, keys[1]);
  EXPECT_EQ((*watch)->stored().size(), 1u);
}

TEST(RootWatch, GivesNoMoreThanIsAskedForAndTheRestLater) {
  const TemporaryDirectory directory("/dev/shm");
  const std::string root = directory.path() + "/root";
  auto depot = open_at(root);
  const NamespaceDigest ns = depot->register_namespace(R"({"model":"m"})").value();
  HostCache cache(small_shape(), 10 * kBlocksPerChunk);
  ASSERT_TRUE(depot->attach(cache.paged()));
  ASSERT_EQ(store_chunks(*depot, 1, ns, prompt_keys(ns, 1, 10), 0, 10).items_ok, 10u);
  auto watch = RootWatch::open(root);
  ASSERT_TRUE(watch) << watch.error().message;
  for (const size_t expected : {4u, 4u, 2u, 0u}) EXPECT_EQ((*watch)->poll(4).value().size(), expected);
  EXPECT_EQ((*watch)->stored().size(), 10u);
}

TEST(RootWatch, AnotherRootInTheSamePlaceIsNotTakenForTheFirst) {
  const TemporaryDirectory directory("/dev/shm");
  const std::string root = directory.path() + "/root";
  open_at(root);
  auto watch = RootWatch::open(root);
  ASSERT_TRUE(watch && (*watch)->poll());
  std::filesystem::remove_all(root);
  EXPECT_EQ((*watch)->poll().error().kind, ErrorKind::not_found);
  open_at(root);
  EXPECT_EQ((*watch)->poll().error().kind, ErrorKind::not_found);
}

}  // namespace
}  // namespace tokendepot::testing
