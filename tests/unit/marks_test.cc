// Marks of the engine's stream: which work waits for which mark.
#include "device_fixture.h"

namespace tokendepot::testing {
namespace {

using ::testing::ElementsAre;

using MarksTest = TransfersOnDevice;

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
