// The automatic size of segments, and segments of other sizes in one root.
#include <algorithm>
#include <atomic>
#include <thread>

#include "depot_fixture.h"
#include "store/root.h"

namespace tokendepot::testing {
namespace {

constexpr uint64_t kMiB = 1 << 20;

class SegmentSize : public ::testing::Test {
 protected:
  SegmentSize() : directory_("/dev/shm"), cache_(small_shape(), 64) {}

  std::unique_ptr<Root> open_root(uint64_t capacity, uint64_t segment = 0) {
    Options options;
    options.roots = {
        {.path = directory_.path() + "/root", .capacity_bytes = capacity, .segment_bytes = segment}};
    auto root = Root::open(options.roots[0], 0, options);
    if (!root) ADD_FAILURE() << root.error().message;
    return root ? std::move(*root) : nullptr;
  }
  std::unique_ptr<Depot> open_depot(uint64_t segment) {
    Options options;
    options.roots = {
        {.path = directory_.path() + "/root", .capacity_bytes = 16 * kMiB, .segment_bytes = segment}};
    options.free_space_reserve = 0;
    options.eviction_grace_ms = 0;
    auto depot = Depot::open(options);
    if (!depot) ADD_FAILURE() << depot.error().message;
    ns_ = *(*depot)->register_namespace(R"({"model":"m"})");
    EXPECT_TRUE((*depot)->attach(cache_.paged()));
    return std::move(*depot);
  }

  TemporaryDirectory directory_;
  HostCache cache_;
  NamespaceDigest ns_;
};

TEST_F(SegmentSize, AutomaticSegmentsHoldWholeExtentsWithTheirHeaders) {
  const auto root = open_root(512 * kMiB);
  EXPECT_EQ(root->segment_bytes(), 2 * kMiB) << "a 256th of the root";
  const uint64_t extent = kMiB / 4 + 4096;
  ASSERT_TRUE(root->fit_extent(extent));
  EXPECT_EQ(root->segment_bytes(), 8 * extent) << "the header page does not spoil the eighth";
}

TEST_F(SegmentSize, AStatedSizeGrowsOnlyToHoldOneExtent) {
  const auto root = open_root(64 * kMiB, 4 * kMiB);
  ASSERT_TRUE(root->fit_extent(3 * kMiB));
  EXPECT_EQ(root->segment_bytes(), 4 * kMiB);
  ASSERT_TRUE(root->fit_extent(5 * kMiB));
  EXPECT_EQ(root->segment_bytes(), 5 * kMiB);
}

TEST_F(SegmentSize, ARootWithoutRoomForThreeWholeNumbersTakesSingleExtents) {
  const auto root = open_root(20 * kMiB);
  const uint64_t extent = 6 * kMiB;
  ASSERT_TRUE(root->fit_extent(extent));
  EXPECT_EQ(root->segment_bytes(), extent);
  EXPECT_FALSE(root->fit_extent(7 * kMiB));
}

TEST_F(SegmentSize, SegmentsOfEarlierSizesAreServedRecoveredAndReplaced) {
  uint64_t job = 1;
  const auto want = want_of(small_shape());
  {
    auto depot = open_depot(1 * kMiB);
    cache_.fill(1);
    // The last one by itself, so that its record is the last one.
    ASSERT_EQ(store_chunks(*depot, job++, ns_, prompt_keys(ns_, 1, 16), 0, 15).items_ok, 15u);
    ASSERT_EQ(store_chunks(*depot, job++, ns_, prompt_keys(ns_, 1, 16), 15, 16).items_ok, 1u);
  }
  // The half-filled segment of another size is gone on with: its last record is lost, its bytes are not.
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path() + "/root/journals"))
    std::filesystem::resize_file(entry.path(), std::filesystem::file_size(entry.path()) - 128);
  auto depot = open_depot(2 * kMiB + 12 * 4096);
  ASSERT_EQ(depot->longest_prefix(prompt_keys(ns_, 1, 16), std::vector{want}), 16u);
  const auto keys = prompt_keys(ns_, 1, 16);
  cache_.clear();
  const auto plan = plan_chunks(*depot, ns_, keys, want, 0, 16, 0);
  ASSERT_TRUE(plan);
  ASSERT_TRUE(depot->submit_load(job, *plan));
  ASSERT_EQ(wait_for(*depot, job++).items_ok, 16u);
  HostCache expected(small_shape(), 64);
  expected.fill(1);
  for (int32_t b = 0; b < 64; ++b) ASSERT_EQ(cache_.block(b), expected.block(b));
  // Four times the capacity passes through; segments of both sizes make room for each other.
  for (uint32_t prompt = 2; prompt < 130; ++prompt) {
    const auto more = prompt_keys(ns_, prompt, 16);
    store_until_all_are(*depot, job, ns_, more, 0, 16);
    ASSERT_EQ(depot->longest_prefix(more, std::vector{want}), 16u) << prompt;
    ASSERT_LE(depot->stats().roots[0].used_bytes, 16 * kMiB);
  }
}

TEST_F(SegmentSize, NoFileIsCountedTwiceWhileSegmentsGoRound) {
  auto depot = open_depot(1 * kMiB);
  cache_.fill(1);
  std::atomic<bool> ends = false;
  std::atomic<uint64_t> most = 0;
  std::thread watcher([&] {
    while (!ends) most = std::max(most.load(), depot->stats().roots[0].used_bytes);
  });
  uint64_t job = 1;
  for (uint32_t prompt = 2; prompt < 400 && !HasFailure(); ++prompt)
    store_until_all_are(*depot, job, ns_, prompt_keys(ns_, prompt, 16), 0, 16);
  ends = true;
  watcher.join();
  EXPECT_LE(most, 16 * kMiB);
  EXPECT_GE(most, 14 * kMiB);
}

}  // namespace
}  // namespace tokendepot::testing
