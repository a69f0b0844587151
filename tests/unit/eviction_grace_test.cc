// An evicted segment's file stays for a while: for who was promised something of it, in whatever process.
#include <filesystem>
#include <fstream>
#include <set>

#include "depot_fixture.h"
#include "store/root_writer.h"

namespace tokendepot::testing {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kSecond = 1'000'000'000;
constexpr uint64_t kGrace = 3 * kSecond;

struct HandClock final : Clock {
  uint64_t steady_ns() const override { return now; }
  uint64_t wall_ns() const override { return now; }
  uint64_t now = 1000 * kSecond;
};

class EvictionGrace : public ::testing::Test {
 protected:
  EvictionGrace() : directory_("/dev/shm") {}

  struct Process {
    Process(const std::string& path, uint64_t capacity, const Clock& clock, uint64_t grace) {
      Options options;
      root = std::move(
          *Root::open({.path = path, .capacity_bytes = capacity, .segment_bytes = kMiB}, 0, options));
      replay = std::make_unique<Replay>(*root, segments, &catalog);
      EXPECT_TRUE(replay->first());
      writer = std::move(*RootWriter::open(*root, *replay, segments, clock, 0, grace));
    }
    SegmentTable segments;
    Catalog catalog{segments};
    std::unique_ptr<Root> root;
    std::unique_ptr<Replay> replay;
    std::unique_ptr<RootWriter> writer;
  };

  std::unique_ptr<Process> start(uint64_t capacity = 4 * kMiB, uint64_t grace = kGrace) {
    return std::make_unique<Process>(path(), capacity, clock_, grace);
  }
  std::string path() const { return directory_ / "root"; }
  static Record put_of(uint32_t n) {
    Record put;
    std::memcpy(put.key.bytes.data(), &n, sizeof n);
    put.part = {0, 1, 0, 1};
    put.tokens = 16;
    return put;
  }
  /// Fills a segment with one extent. False: there is no space for it now.
  bool store(Process& process, uint32_t n) {
    clock_.now += 1000;  // so that the coldest is known
    if (process.writer->wants_spare()) (void)process.writer->prepare_spare(nullptr);
    auto place = process.writer->reserve(kMiB);
    if (!place) return false;
    Record put = put_of(n);
    EXPECT_TRUE(process.writer->acknowledge(*place, put));
    places_[n] = place->where.segment;
    return true;
  }
  bool found(Process& process, uint32_t n) {
    process.replay->poll();
    if (process.replay->take_condemned()) process.catalog.sweep();
    const Record put = put_of(n);
    return process.catalog.find(put.key, *process.catalog.part_id({0, put.kind, put.part, put.tokens}))
        .has_value();
  }
  bool there(uint32_t n) const {
    return std::filesystem::exists(path() + "/segments/" + segment_name(places_.at(n)));
  }
  uint64_t bytes_on_medium() const {
    uint64_t total = 0;
    for (const auto& entry : std::filesystem::directory_iterator(path() + "/segments"))
      total += entry.file_size();
    return total;
  }

  TemporaryDirectory directory_;
  HandClock clock_;
  std::map<uint32_t, SegmentId> places_;
};

TEST_F(EvictionGrace, WhatIsEvictedIsMissedAtOnceAndCanBeReadUntilTheGraceIsOver) {
  auto evicting = start();
  auto promising = start();
  for (uint32_t n = 0; n < 3; ++n) ASSERT_TRUE(store(*evicting, n));
  ASSERT_TRUE(found(*promising, 0));
  ASSERT_TRUE(store(*evicting, 3));  // and the root is full: the coldest is on its way out
  EXPECT_FALSE(found(*promising, 0));
  EXPECT_TRUE(there(0));
  EXPECT_TRUE(promising->root->files().open(places_[0])) << "a promise made before that can be kept";
  clock_.now += kGrace - kSecond;
  EXPECT_FALSE(store(*evicting, 4));
  EXPECT_TRUE(there(0));
  clock_.now += kSecond;
  EXPECT_TRUE(store(*evicting, 4));
  EXPECT_FALSE(there(0));
}

TEST_F(EvictionGrace, WithoutAGraceTheColdestMakesRoomAtOnce) {
  auto process = start(4 * kMiB, 0);
  for (uint32_t n = 0; n < 20; ++n) EXPECT_TRUE(store(*process, n)) << n;
  EXPECT_EQ(process->writer->leaving_bytes(), 0u);
}

TEST_F(EvictionGrace, CondemnedFilesCountAgainstTheCapacity) {
  auto first = start(8 * kMiB);
  auto second = start(8 * kMiB);
  uint32_t stored = 0;
  for (uint32_t n = 0; n < 200; ++n) {
    stored += store(n % 2 == 0 ? *first : *second, n) ? 1 : 0;
    ASSERT_LE(bytes_on_medium(), 8 * kMiB) << n;
    clock_.now += kSecond / 2;
  }
  EXPECT_GE(stored, 60u) << "of 100 s, with at least two segments a grace";
}

TEST_F(EvictionGrace, AsMuchIsCondemnedAheadAsIsStoredInAGrace) {
  auto process = start(64 * kMiB);
  uint32_t n = 0;
  for (; n < 64; ++n) store(*process, n);
  // Two segments a second: six a grace. After a few graces no store has to wait.
  uint32_t refused = 0;
  for (uint32_t i = 0; i < 80; ++i) {
    refused += store(*process, ++n) ? 0 : 1;
    if (i == 40) refused = 0;
    clock_.now += kSecond / 2;
  }
  EXPECT_EQ(refused, 0u);
  EXPECT_GE(process->writer->leaving_bytes(), 6 * kMiB);
  EXPECT_LE(process->writer->leaving_bytes(), 64 * kMiB / 4);
}

TEST_F(EvictionGrace, ALoadUnderWayKeepsTheFileBeyondTheGrace) {
  auto process = start();
  for (uint32_t n = 0; n < 4; ++n) ASSERT_TRUE(store(*process, n));
  const SegmentId first = places_[0];
  {
    const SegmentInUse loading(process->segments, *process->segments.find(first));
    clock_.now += 2 * kGrace;
    EXPECT_FALSE(store(*process, 4) && store(*process, 5));
    EXPECT_TRUE(there(0));
  }
  clock_.now += kGrace;
  EXPECT_TRUE(store(*process, 6));
  EXPECT_FALSE(there(0));
}

TEST_F(EvictionGrace, WhatACrashedKeeperHasCondemnedGoesAfterAWholeGraceOfTheNextOne) {
  {
    auto crashed = start();
    for (uint32_t n = 0; n < 4; ++n) ASSERT_TRUE(store(*crashed, n));
    ASSERT_GT(crashed->writer->leaving_bytes(), 0u);
  }
  clock_.now += kGrace - kSecond;
  auto heir = start();
  EXPECT_TRUE(there(0)) << "starting removes nothing that may have been promised";
  heir->writer->remove_orphans();
  clock_.now += 2 * kSecond;
  heir->writer->remove_orphans();
  EXPECT_TRUE(there(0)) << "it cannot know since when";
  clock_.now += kSecond;
  heir->writer->remove_orphans();
  EXPECT_FALSE(there(0));
}

TEST_F(EvictionGrace, AMediumThatOthersHaveFilledWaitsForNoGrace) {
  if (!directory_.mount_tmpfs("size=8m")) GTEST_SKIP() << "may not mount";
  auto process = start(6 * kMiB);
  for (uint32_t n = 0; n < 3; ++n) ASSERT_TRUE(store(*process, n));
  std::ofstream other(directory_ / "another-tenant", std::ios::binary | std::ios::app);
  const std::vector<char> block(4096, 'x');
  while (other.write(block.data(), 4096).flush()) {
  }
  // No time passes at all.
  uint32_t stored = 0;
  for (uint32_t n = 3; n < 10; ++n) stored += store(*process, n) ? 1 : 0;
  EXPECT_GE(stored, 3u);
}

TEST_F(EvictionGrace, ALoadOfWhatAnotherProcessEvictsMeanwhileIsServed) {
  Options options;
  options.roots = {{.path = path(), .capacity_bytes = 8 * kMiB, .segment_bytes = kMiB}};
  options.free_space_reserve = 0;
  options.poll_ms = 20;
  options.eviction_grace_ms = 20'000;
  const GroupShape shape = small_shape();
  HostCache cache(shape, 64);
  HostCache other(shape, 64);
  auto promising = std::move(*Depot::open(options));
  auto evicting = std::move(*Depot::open(options));
  const NamespaceDigest ns = *promising->register_namespace(R"({"model":"m"})");
  ASSERT_TRUE(promising->attach(cache.paged()));
  ASSERT_TRUE(evicting->attach(other.paged()));
  const auto keys = prompt_keys(ns, 0, 8);
  other.fill(0);
  ASSERT_EQ(store_chunks(*evicting, 1, ns, keys, 0, 8).items_ok, 8u);
  promising->refresh();
  const auto plan = plan_chunks(*promising, ns, keys, want_of(shape), 0, 8, 0);
  ASSERT_TRUE(plan);
  for (uint32_t prompt = 1; prompt < 100 && evicting->stats().roots[0].evicted_segments < 2; ++prompt) {
    StorePlan more;
    more.ns = ns;
    const auto others = prompt_keys(ns, prompt, 8);
    for (uint32_t i = 0; i < 8; ++i)
      more.items.push_back(
          {others[i], i, 0, iota_blocks(static_cast<int32_t>(i * kBlocksPerChunk), kBlocksPerChunk)});
    ASSERT_TRUE(evicting->submit_store(1 + prompt, more));
    usleep(20'000);
    (void)evicting->poll();
  }
  promising->refresh();
  ASSERT_EQ(promising->longest_prefix(keys, std::vector{want_of(shape)}), 0u) << "it is evicted";
  ASSERT_TRUE(promising->submit_load(1, *plan));
  EXPECT_EQ(wait_for(*promising, 1).items_ok, 8u);
  HostCache expected(shape, 64);
  expected.fill(0);
  for (int32_t block = 0; block < 32; ++block) EXPECT_EQ(cache.block(block), expected.block(block));
}

}  // namespace
}  // namespace tokendepot::testing
