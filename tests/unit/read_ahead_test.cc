// How far reads run ahead of the engine that carries them out.
#include "device_fixture.h"

namespace tokendepot::testing {
namespace {

constexpr uint32_t kDepth = 2;
constexpr uint32_t kMostReads = kDepth + 4;

Options with_depth(uint32_t depth) {
  Options options;
  options.io_depth = depth;
  return options;
}

RootOptions staged() {
  RootOptions root;
  root.transport = TransportChoice::buffered;
  root.io = IoChoice::threads;
  return root;
}

class ReadAheadTest : public TransfersOnDevice {
 protected:
  ReadAheadTest() : TransfersOnDevice(with_depth(kDepth), staged()) {}
};

TEST_F(ReadAheadTest, StagingHoldsWhatIsReadSoonAndNotAllThatWaits) {
  store(0, 1);
  const LoadPlan many = plan_many(60);
  const uint64_t extent = many.items[0].where.bytes;
  device_.forget_most_staged();
  device_.break_down(true);  // what was read is given back by the thread that read it
  ASSERT_TRUE(transfers_->submit_load(100, many));
  EXPECT_EQ(completion_of(100).failures.size(), 60u);
  EXPECT_GE(device_.most_staged(), 2 * extent);
  // And those that a thread has read and not given back.
  EXPECT_LE(device_.most_staged(), (kMostReads + kDepth) * extent);
}

constexpr uint64_t kExtentBytes = 68 << 10;
constexpr uint32_t kSlots = 4;

RootOptions one_extent_at_once() {
  RootOptions root = staged();
  root.reads_at_once_bytes = kExtentBytes;
  return root;
}

class BoundedReadAheadTest : public TransfersOnDevice {
 protected:
  explicit BoundedReadAheadTest(std::vector<RootOptions> roots = {one_extent_at_once()})
      : TransfersOnDevice(with_depth(kSlots), std::move(roots)) {}

  void load_again_and_again() {
    const LoadPlan many = plan_many(60);
    ASSERT_EQ(many.items[0].where.bytes, kExtentBytes);
    device_.forget_most_staged();
    device_.break_down(true);  // what was read is given back by the thread that read it
    for (uint64_t job = 100; job < 120; ++job) {
      ASSERT_TRUE(transfers_->submit_load(job, many));
      EXPECT_EQ(completion_of(job).failures.size(), 60u);
    }
    device_.break_down(false);
  }
  // And those that a thread has read and not given back.
  static constexpr uint64_t kMostStaged = (1 + kSlots) * kExtentBytes;
};

class BoundedReadAheadBesideStores : public BoundedReadAheadTest {
 protected:
  BoundedReadAheadBesideStores() : BoundedReadAheadTest({one_extent_at_once(), RootOptions()}) {}
};

TEST_F(BoundedReadAheadTest, NoLoadIsBegunWhileAsManyBytesAreBeingReadAsAreEnough) {
  store(0, 1);
  load_again_and_again();
  EXPECT_LE(device_.most_staged(), kMostStaged);
}

TEST_F(BoundedReadAheadBesideStores, ReadsOfTheSameRootAreNotBoundedThoseOfAnotherAre) {
  store(0, 1);
  for (const bool same : {true, false}) {
    SCOPED_TRACE(same);
    device_.hold_gathers();
    submit_store(same ? 1 : 2, same ? 2 : 3, same ? 0 : 1);
    while (device_.held_gathers() == 0) usleep(1000);
    load_again_and_again();
    EXPECT_EQ(device_.most_staged() > kMostStaged, same);
    device_.let_gathers_go();
    EXPECT_EQ(ended(job_), 1u);
  }
  load_again_and_again();
  EXPECT_LE(device_.most_staged(), kMostStaged) << "the stores have ended";
}

TEST_F(BoundedReadAheadTest, AllThatWaitsIsReadInTheEnd) {
  store(0, 2);
  for (uint64_t job = 100; job < 120; ++job) {
    ASSERT_TRUE(transfers_->submit_load(job, plan_many(60, job % 2)));
    EXPECT_EQ(ended(job), 60u);
  }
}

TEST_F(ReadAheadTest, AllThatWaitsIsReadInTheEndAlsoBehindReadsThatFail) {
  store(0, 1);
  store(1, 2);
  const ExtentRef second = plan(1).items[0].where;
  ASSERT_EQ(second.segment, plan(0).items[0].where.segment);
  const LoadPlan gone = plan_many(60, 1);
  const std::string file = directory_.path() + "/root/segments/" + segment_name(second.segment);
  ASSERT_EQ(::truncate(file.c_str(), static_cast<off_t>(second.offset)), 0);
  ASSERT_TRUE(transfers_->submit_load(50, gone));
  EXPECT_EQ(completion_of(50).failures.size(), 60u);
  for (uint64_t job = 100; job < 120; ++job) {
    ASSERT_TRUE(transfers_->submit_load(job, plan_many(60)));
    EXPECT_EQ(ended(job), 60u);
  }
}

}  // namespace
}  // namespace tokendepot::testing
