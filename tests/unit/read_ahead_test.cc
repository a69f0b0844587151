// How far reads run ahead of the engine that carries them out.
#include <utility>
#include <vector>

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

class StagingTest : public TransfersOnDevice {
 protected:
  using TransfersOnDevice::TransfersOnDevice;

  /// Bytes that were staged at once, at most, while 60 loads of one extent waited, time and again; at once
  /// when it is as much as `enough`, which a thread that was kept from the processor may not reach the first
  /// time.
  uint64_t most_staged(uint64_t enough = UINT64_MAX) {
    const LoadPlan many = plan_many(60);
    device_.forget_most_staged();
    device_.break_down(true);  // what was read is given back by the thread that read it
    for (int i = 0; i < (enough == UINT64_MAX ? 20 : 1000) && device_.most_staged() < enough; ++i) {
      EXPECT_TRUE(transfers_->submit_load(++job_, many));
      EXPECT_EQ(completion_of(job_).failures.size(), 60u);
    }
    device_.break_down(false);
    return device_.most_staged();
  }
};

class ReadAheadTest : public StagingTest {
 protected:
  ReadAheadTest() : StagingTest(with_depth(kDepth), staged()) {}
};

TEST_F(ReadAheadTest, StagingHoldsWhatIsReadSoonAndNotAllThatWaits) {
  store(0, 1);
  const uint64_t extent = plan(0).items[0].where.bytes;
  EXPECT_GE(most_staged(2 * extent), 2 * extent);
  // And those that a thread has read and not given back.
  EXPECT_LE(most_staged(), (kMostReads + kDepth) * extent);
}

constexpr uint64_t kExtentBytes = 68 << 10;
constexpr uint32_t kSlots = 4;

RootOptions one_extent_at_once() {
  RootOptions root = staged();
  root.reads_at_once_bytes = kExtentBytes;
  return root;
}

class BoundedReadAheadTest : public StagingTest {
 protected:
  explicit BoundedReadAheadTest(std::vector<RootOptions> roots = {one_extent_at_once()})
      : StagingTest(with_depth(kSlots), std::move(roots)) {}

  // And those that a thread has read and not given back.
  static constexpr uint64_t kMostStaged = (1 + kSlots) * kExtentBytes;
};

class BoundedReadAheadBesideStoresTest : public BoundedReadAheadTest {
 protected:
  BoundedReadAheadBesideStoresTest() : BoundedReadAheadTest({one_extent_at_once(), in_memory()}) {}

  static RootOptions in_memory() {  // its stores are not staged
    RootOptions root;
    root.transport = TransportChoice::mapped;
    return root;
  }
  void begin_store(size_t chunk, size_t root) {
    device_.hold_gathers();
    submit_store(chunk, chunk + 1, root);
    store_ = job_;
    for (int i = 0; i < 10'000 && device_.held_gathers() == 0; ++i) usleep(1000);
    ASSERT_EQ(device_.held_gathers(), 1u);
  }
  void end_store() {
    const uint64_t job = std::exchange(store_, 0);
    device_.let_gathers_go();
    EXPECT_EQ(ended(job), 1u);
  }
  uint64_t store_ = 0;
};

TEST_F(BoundedReadAheadTest, NoLoadIsBegunWhileAsManyBytesAreBeingReadAsAreEnough) {
  store(0, 1);
  ASSERT_EQ(plan(0).items[0].where.bytes, kExtentBytes);
  EXPECT_LE(most_staged(), kMostStaged);
}

TEST_F(BoundedReadAheadBesideStoresTest, ReadsOfTheRootThatIsStoredIntoAreNotBoundedThoseOfAnotherAre) {
  store(0, 1);
  begin_store(1, 0);
  constexpr uint64_t kMore = kMostStaged + 2 * kExtentBytes;  // one is the store's
  EXPECT_GE(most_staged(kMore), kMore);
  end_store();
  begin_store(2, 1);
  EXPECT_LE(most_staged(), kMostStaged);
  end_store();
  EXPECT_LE(most_staged(), kMostStaged);
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
