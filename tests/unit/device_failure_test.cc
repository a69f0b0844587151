// A device that can do nothing any more: what is under way ends as failed, and nothing says that extents are
// bad.
#include "device_fixture.h"

namespace tokendepot::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::Field;

using DeviceFailureTest = TransfersOnDevice;
using Reason = ItemFailure::Reason;

TEST_F(DeviceFailureTest, ALoadIsAnIoErrorAndTheExtentIsServedAgainOnceTheDeviceIsWell) {
  store(0, 1);
  const LoadPlan stored = plan(0);
  device_.break_down(true);
  ASSERT_TRUE(transfers_->submit_load(100, stored));
  const Completion failed = completion_of(100);
  EXPECT_EQ(failed.items_ok, 0u);
  EXPECT_THAT(failed.failures, ElementsAre(Field(&ItemFailure::reason, Reason::io_error)));
  device_.break_down(false);
  const PartId part = *catalog_.part_id({0, LayoutKind::canonical, shape_.part, shape_.tokens});
  EXPECT_TRUE(catalog_.find(keys_[0], part)) << "condemned, and nothing is wrong with it";
  ASSERT_TRUE(transfers_->submit_load(101, stored));
  EXPECT_EQ(ended(101), 1u);
}

TEST_F(DeviceFailureTest, AStoreIsAnIoErrorIsNotPublishedAndHoldsNobodyUp) {
  device_.break_down(true);
  StorePlan plan;
  plan.ns = ns_;
  plan.items.push_back({keys_[0], 0, 0, iota_blocks(0, kBlocksPerChunk)});
  ASSERT_TRUE(transfers_->submit_store(100, plan, *roots_[0].keeper));
  EXPECT_TRUE(transfers_->wait_gathered(10'000'000'000));
  EXPECT_THAT(completion_of(100).failures, ElementsAre(Field(&ItemFailure::reason, Reason::io_error)));
  const PartId part = *catalog_.part_id({0, LayoutKind::canonical, shape_.part, shape_.tokens});
  EXPECT_FALSE(catalog_.find(keys_[0], part));
}

TEST_F(DeviceFailureTest, WhatIsHeldFailsToBePlacedAndItsMemoryIsGivenBack) {
  store(0, 1);
  ASSERT_TRUE(transfers_->submit_load(100, plan(0), true));
  ASSERT_EQ(ended(100), 1u);
  device_.break_down(true);
  const Depot::HeldBlocks blocks{0, 0, iota_blocks(40, kBlocksPerChunk)};
  ASSERT_TRUE(transfers_->place(101, 100, std::span(&blocks, 1)));
  EXPECT_THAT(completion_of(101).failures, ElementsAre(Field(&ItemFailure::reason, Reason::io_error)));
  std::byte* const whole = device_.slab().allocate(device_.slab().size());
  ASSERT_NE(whole, nullptr);
  device_.slab().release(whole);
}

}  // namespace
}  // namespace tokendepot::testing
