// Marks of the engine's stream: which work waits for which mark.
#include <gmock/gmock.h>

#include "depot_fixture.h"
#include "recording_device.h"
#include "store/catalog.h"
#include "store/replay.h"
#include "transfer/transfers.h"

namespace tokendepot::testing {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::SizeIs;

/// Transfers and all they need, over a device that records.
class MarksTest : public ::testing::Test {
 protected:
  MarksTest() {
    Options options;
    options.roots = {
        {.path = directory_.path() + "/root", .capacity_bytes = 16 << 20, .segment_bytes = 1 << 20}};
    root_ = std::move(*Root::open(options.roots[0], 0, options, &device_));
    replay_ = std::make_unique<Replay>(*root_, segments_, &catalog_);
    EXPECT_TRUE(replay_->first());
    writer_ = std::move(*RootWriter::open(*root_, *replay_, segments_, system_clock(), 0));
    transfers_ =
        std::make_unique<Transfers>(device_, std::vector{Transfers::Tier{root_.get(), writer_.get()}},
                                    segments_, system_clock(), 64 << 20);
    keeper_ = std::make_unique<Keeper>(std::vector{Keeper::Tier{root_.get(), replay_.get(), writer_.get()}},
                                       segments_, &catalog_, 20, [this] { transfers_->space_ready(); });
    EXPECT_TRUE(transfers_->attach(cache_.paged()));
    cache_.fill(1);
  }
  ~MarksTest() override {
    transfers_->close();
    keeper_.reset();
    transfers_.reset();
  }

  void store(size_t first, size_t last) {
    StorePlan plan;
    plan.ns = ns_;
    for (size_t i = first; i < last; ++i) {
      plan.items.push_back({keys_[i], static_cast<uint32_t>(i), 0,
                            iota_blocks(static_cast<int32_t>(i * kBlocksPerChunk), kBlocksPerChunk)});
    }
    ASSERT_TRUE(transfers_->submit_store(++job_, plan, *keeper_));
    ASSERT_TRUE(transfers_->flush(10'000'000'000));
    ASSERT_THAT(transfers_->poll(), SizeIs(1));
  }
  LoadPlan plan(size_t chunk) {
    const PartId part = *catalog_.part_id({0, LayoutKind::canonical, shape_.part, shape_.tokens});
    const auto found = catalog_.find(keys_[chunk], part);
    EXPECT_TRUE(found);
    LoadPlan plan;
    plan.ns = ns_;
    plan.items.push_back({keys_[chunk],
                          static_cast<uint32_t>(chunk),
                          0,
                          LayoutKind::canonical,
                          shape_.part,
                          shape_.tokens,
                          {segments_.id_of(found->slot), found->offset, found->bytes},
                          iota_blocks(40, kBlocksPerChunk)});
    return plan;
  }
  uint32_t ended(uint64_t job) {
    for (int i = 0; i < 10'000; ++i, usleep(1000)) {
      for (const Completion& done : transfers_->poll()) {
        if (done.job == job) return done.items_ok;
      }
    }
    ADD_FAILURE() << "never reported";
    return 0;
  }

  const TemporaryDirectory directory_{"/dev/shm"};
  const GroupShape shape_ = small_shape();
  HostCache cache_{shape_, 64};
  const NamespaceDigest ns_{};
  const std::vector<Key> keys_ = prompt_keys(ns_, 1, 8);
  uint64_t job_ = 0;
  RecordingDevice device_;
  SegmentTable segments_;
  Catalog catalog_{segments_};
  std::unique_ptr<Root> root_;
  std::unique_ptr<Replay> replay_;
  std::unique_ptr<RootWriter> writer_;
  std::unique_ptr<Transfers> transfers_;
  std::unique_ptr<Keeper> keeper_;
};

TEST_F(MarksTest, StoresAndLoadsWaitForTheLastMarkBeforeTheirSubmission) {
  store(0, 2);
  EXPECT_THAT(device_.take_gather_marks(), ElementsAre(0u, 0u)) << "nothing was marked yet";
  ASSERT_TRUE(transfers_->mark_stream(nullptr));
  store(2, 4);
  EXPECT_THAT(device_.take_gather_marks(), ElementsAre(1u, 1u));
  ASSERT_TRUE(transfers_->mark_stream(nullptr));
  ASSERT_TRUE(transfers_->mark_stream(nullptr));
  ASSERT_TRUE(transfers_->submit_load(100, plan(0)));
  ASSERT_TRUE(transfers_->mark_stream(nullptr));
  EXPECT_EQ(ended(100), 1u);
  EXPECT_THAT(device_.take_scatter_marks(), ElementsAre(3u)) << "not for what was marked later";
}

TEST_F(MarksTest, AHeldLoadWaitsForTheMarkBeforeItIsPlaced) {
  store(0, 1);
  ASSERT_TRUE(transfers_->mark_stream(nullptr));
  ASSERT_TRUE(transfers_->submit_load(100, plan(0), true));
  EXPECT_EQ(ended(100), 1u);
  EXPECT_THAT(device_.take_scatter_marks(), ElementsAre(0u)) << "it only verifies: the cache is not touched";
  ASSERT_TRUE(transfers_->mark_stream(nullptr));
  const Depot::HeldBlocks blocks{0, 0, iota_blocks(40, kBlocksPerChunk)};
  ASSERT_TRUE(transfers_->place(101, 100, std::span(&blocks, 1)));
  EXPECT_EQ(ended(101), 1u);
  EXPECT_THAT(device_.take_scatter_marks(), ElementsAre(2u));
}

}  // namespace
}  // namespace tokendepot::testing
