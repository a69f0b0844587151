// D7: chunks of several groups, e.g. keys and values beside an index. Without one of its parts a chunk is no
// hit, whether the part went before the look-up, between look-up and load, or was never stored.
#include <algorithm>
#include <filesystem>
#include <set>

#include "store/journal_file.h"
#include "transfers_fixture.h"

namespace tokendepot::testing {
namespace {

constexpr size_t kChunks = 16;
constexpr uint32_t kMissing = 10;

GroupShape index_shape() {
  GroupShape shape = small_shape();
  shape.group = 1;
  shape.row_bytes = 48;  // two extents of either group are larger than a segment
  return shape;
}

class SeveralGroups : public TransfersOn {
 protected:
  Options one_extent_a_segment() {
    Options options = this->options();
    options.roots[0].segment_bytes = 72 << 10;
    return options;
  }
  void attach(Depot& depot) {
    ASSERT_TRUE(depot.attach(cache_.paged()));
    ASSERT_TRUE(depot.attach(index_.paged()));
  }
  void store(Depot& depot, uint16_t group, size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      StorePlan plan;
      plan.ns = ns_;
      plan.items.push_back({keys_[i], static_cast<uint32_t>(i), group,
                            iota_blocks(static_cast<int32_t>(i * kBlocksPerChunk), kBlocksPerChunk)});
      until_stored([&] {
        const uint64_t job = ++next_job_;
        EXPECT_TRUE(depot.submit_store(job, plan));
        return wait_for(depot, job).items_ok == 1;
      });
    }
  }
  void fill() {
    cache_.fill(1);
    index_.fill(2);
  }
  /// Both groups of chunks [0, chunks), into the blocks that they came from.
  LoadPlan plan(Depot& depot, size_t chunks) {
    const auto blocks = iota_blocks(0, chunks * kBlocksPerChunk);
    const std::vector<Depot::LoadGroup> groups{{wants_[0], 0, kBlocksPerChunk, blocks},
                                               {wants_[1], 0, kBlocksPerChunk, blocks}};
    const auto planned = depot.plan_load(ns_, keys_, groups, 10s);
    EXPECT_TRUE(planned) << (planned ? "" : planned.error().message);
    return planned ? *planned : LoadPlan{};
  }
  static const ExtentRef& place_of(const LoadPlan& plan, uint16_t group, uint32_t chunk) {
    return std::ranges::find_if(
               plan.items, [&](const LoadItem& item) { return item.group == group && item.chunk == chunk; })
        ->where;
  }
  void remove(const ExtentRef& where) {
    ASSERT_TRUE(std::filesystem::remove(directory_.path() + "/root/segments/" + segment_name(where.segment)));
  }
  /// Opens a depot in which everything is stored and no file is open yet.
  std::unique_ptr<Depot> with_everything_stored() {
    {
      const auto depot = open(one_extent_a_segment());
      keys_ = prompt_keys(ns_, 1, kChunks);
      attach(*depot);
      fill();
      store(*depot, 0, 0, kChunks);
      store(*depot, 1, 0, kChunks);
    }
    auto depot = open(one_extent_a_segment());
    attach(*depot);
    return depot;
  }
  void expect_usable(Depot& depot, size_t chunks) {
    ASSERT_EQ(depot.longest_prefix(keys_, wants_), chunks);
    cache_.clear();
    index_.clear();
    EXPECT_EQ(load(depot, plan(depot, chunks)).items_ok, 2 * chunks);
    HostCache expected(small_shape(), kBlocks);
    HostCache expected_index(index_shape(), kBlocks);
    expected.fill(1);
    expected_index.fill(2);
    for (int32_t b = 0; b < static_cast<int32_t>(chunks * kBlocksPerChunk); ++b) {
      ASSERT_EQ(cache_.block(b), expected.block(b)) << b;
      ASSERT_EQ(index_.block(b), expected_index.block(b)) << b;
    }
  }

  HostCache index_{index_shape(), kBlocks};
  std::vector<Key> keys_;
  const std::vector<GroupWant> wants_{want_of(small_shape()), want_of(index_shape())};
};

TEST_P(SeveralGroups, APartThatWentBeforeTheLookupEndsTheUsablePrefix) {
  auto depot = with_everything_stored();
  const LoadPlan all = plan(*depot, kChunks);
  depot.reset();
  remove(place_of(all, 1, kMissing));
  depot = open(one_extent_a_segment());
  attach(*depot);
  expect_usable(*depot, kMissing);
}

TEST_P(SeveralGroups, APartThatGoesBetweenLookupAndLoadIsReportedAndEndsTheNextPrefix) {
  const auto depot = with_everything_stored();
  ASSERT_EQ(depot->longest_prefix(keys_, wants_), kChunks);
  const LoadPlan all = plan(*depot, kChunks);
  remove(place_of(all, 1, kMissing));
  const Completion done = load(*depot, all);
  EXPECT_EQ(done.items_ok, 2 * kChunks - 1);
  ASSERT_EQ(done.failures.size(), 1u);
  EXPECT_EQ(done.failures[0].chunk, kMissing);
  EXPECT_EQ(done.failures[0].group, 1);
  expect_usable(*depot, kMissing);
  fill();
  store(*depot, 1, kMissing, kMissing + 1);
  expect_usable(*depot, kChunks);
}

TEST_P(SeveralGroups, APartThatWasNeverStoredEndsTheUsablePrefix) {
  const auto depot = open(one_extent_a_segment());
  keys_ = prompt_keys(ns_, 1, kChunks);
  attach(*depot);
  fill();
  store(*depot, 0, 0, kChunks);
  EXPECT_EQ(depot->longest_prefix(keys_, wants_), 0u);
  store(*depot, 1, 0, kMissing);
  expect_usable(*depot, kMissing);
}

INSTANTIATE_TEST_SUITE_P(Roots, SeveralGroups, ::testing::Values("tmpfs", "disk"),
                         [](const auto& suite) { return suite.param; });

}  // namespace
}  // namespace tokendepot::testing
