// Calls of the driver that fail, one after the other: work ends as failed, what is told to be there is right,
// and nothing of it is left for what comes next.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "device/cuda/cuda_device.h"
#include "device/host_kernels.h"
#include "fake_cuda/faults.h"
#include "gpu/device_memory.h"
#include "unit/depot_fixture.h"

namespace tokendepot::testing {
namespace {

constexpr size_t kExtents = 6;
constexpr size_t kBadExtent = 2;
constexpr uint64_t kTellTale = 0x5a5a5a5a5a5a5a5a;

/// What became of each work of a batch: how it ended, and whether its `done` was called once.
struct Ended {
  std::atomic<int> calls = 0;
  std::atomic<bool> ok = false;
  std::atomic<ScatterOutcome> outcome = ScatterOutcome::gone;
};

class FailedCalls : public ::testing::Test {
 protected:
  explicit FailedCalls(uint16_t layers = 4, uint32_t row_bytes = 256) {
    form_.shape = small_shape({0, layers, 0, 2});
    form_.shape.row_bytes = row_bytes;
  }
  void SetUp() override {
    per_extent_ = form_.shape.blocks();
    form_.blocks = static_cast<uint32_t>(2 * kExtents) * per_extent_;
    auto made = make_cuda_device(0, 32ull << 20, 64ull << 20, 2);
    ASSERT_TRUE(made) << made.error().message;
    device_ = std::move(*made);
    memory_ = std::make_unique<DeviceMemory>(form_.bytes());
    cells_ = random_bytes(form_.bytes(), 5);
    memory_->upload(cells_);
    cache_ = form_.at(memory_->data());
    payload_bytes_ = form_.shape.payload_bytes();
    slab_ = device_->slab().allocate(kExtents * payload_bytes_);
    ASSERT_NE(slab_, nullptr);
    ordinary_.resize(kExtents * payload_bytes_);
  }
  void TearDown() override {
    fake_cuda::stop_failing();
    fake_cuda::let_copies_go();
    if (slab_ != nullptr) device_->slab().release(slab_);
  }

  std::span<std::byte> payload(std::byte* base, size_t i) const {
    return {base + i * payload_bytes_, payload_bytes_};
  }
  std::vector<int32_t> blocks(size_t extent) const {
    return iota_blocks(static_cast<int32_t>(extent * per_extent_), per_extent_);
  }

  /// Gathers all extents side by side; those that are said to be good are compared with the host's twin.
  size_t store_all(std::byte* base) {
    memory_->upload(cells_);
    std::vector<Ended> ended(kExtents);
    std::vector<std::vector<uint64_t>> digests(kExtents);
    std::vector<std::vector<int32_t>> from(kExtents);
    std::vector<GatherWork> works(kExtents);
    fake_cuda::hold_copies();  // those behind the first ones gather to one copy
    for (size_t i = 0; i < kExtents; ++i) {
      from[i] = blocks(i);
      digests[i].resize(form_.shape.shards());
      works[i].cache = &cache_;
      works[i].blocks = from[i];
      works[i].payload = payload(base, i);
      works[i].digests = digests[i];
      works[i].owner = &ended[i];
      works[i].done = [](GatherWork* self, bool ok) {
        auto* const at = static_cast<Ended*>(self->owner);
        at->ok = ok;
        ++at->calls;
      };
      device_->submit(&works[i]);
    }
    fake_cuda::let_copies_go();
    for (const Ended& one : ended) wait(one);
    calls_of_stores_ = fake_cuda::stop_failing();
    size_t good = 0;
    for (size_t i = 0; i < kExtents; ++i) {
      if (!ended[i].ok) continue;
      ++good;
      std::vector<std::byte> expected(payload_bytes_);
      std::vector<uint64_t> expected_digests(form_.shape.shards());
      const PagedCache host = form_.at(reinterpret_cast<std::byte*>(cells_.data()));
      GatherWork twin;
      twin.cache = &host;
      twin.blocks = from[i];
      twin.payload = expected;
      twin.digests = expected_digests;
      gather_and_digest(twin);
      EXPECT_TRUE(std::ranges::equal(expected, payload(base, i))) << "extent " << i;
      EXPECT_EQ(digests[i], expected_digests) << "extent " << i;
    }
    return good;
  }

  /// A load of an extent of the host's cells, into the other half of the blocks. What it points to outlives
  /// it.
  struct Load {
    ExtentHeader header;
    std::vector<int32_t> to;
    ScatterWork work;
    Ended ended;
  };
  void make_load(std::byte* base, size_t i, Load& load) {
    const PagedCache host = form_.at(reinterpret_cast<std::byte*>(cells_.data()));
    const auto from = blocks(i);
    std::vector<uint64_t> digests(form_.shape.shards());
    GatherWork twin;
    twin.cache = &host;
    twin.blocks = from;
    twin.payload = payload(base, i);
    twin.digests = digests;
    gather_and_digest(twin);
    load.header.set_shape(form_.shape);
    load.header.shard_digests = digests;
    load.to = blocks(kExtents + i);
    load.work.cache = &cache_;
    load.work.header = &load.header;
    load.work.payload = payload(base, i);
    load.work.shards = form_.shape.shards();
    load.work.blocks = load.to;
    load.work.owner = &load.ended;
    load.work.done = [](ScatterWork* self, ScatterOutcome outcome) {
      auto* const at = static_cast<Ended*>(self->owner);
      at->outcome = outcome;
      ++at->calls;
    };
  }

  /// Scatters all extents, one of them with a flipped bit, and tells what became of each. Its blocks are what
  /// was stored, or what was there before, and that by the outcome.
  std::vector<ScatterOutcome> load_all(std::byte* base) {
    memory_->fill(0, form_.bytes(), 0x5a);
    std::vector<Load> loads(kExtents);
    for (size_t i = 0; i < kExtents; ++i) {
      make_load(base, i, loads[i]);
      if (i == kBadExtent) payload(base, i)[17] ^= std::byte{8};
      device_->submit(&loads[i].work);
    }
    for (const Load& load : loads) wait(load.ended);
    calls_of_loads_ = fake_cuda::stop_failing();
    std::vector<ScatterOutcome> outcomes;
    for (const Load& load : loads) outcomes.push_back(load.ended.outcome);
    expect_cells(outcomes);
    return outcomes;
  }

  void expect_cells(const std::vector<ScatterOutcome>& outcomes) const {
    const auto now = memory_->download();
    const uint64_t page = form_.page_bytes();
    for (size_t i = 0; i < kExtents; ++i) {
      for (uint64_t layer = 0; layer < form_.shape.part.layers(); ++layer) {
        const uint64_t from = (layer * form_.blocks + i * per_extent_) * page, bytes = per_extent_ * page;
        const uint64_t to = from + kExtents * per_extent_ * page;
        const bool whole = std::memcmp(now.data() + to, cells_.data() + from, bytes) == 0;
        const bool untouched = std::all_of(now.begin() + static_cast<ptrdiff_t>(to),
                                           now.begin() + static_cast<ptrdiff_t>(to + bytes),
                                           [](uint8_t cell) { return cell == (kTellTale & 0xff); });
        if (outcomes[i] == ScatterOutcome::ok) {
          EXPECT_TRUE(whole) << "extent " << i << ", layer " << layer;
        } else if (outcomes[i] == ScatterOutcome::corrupt) {
          EXPECT_TRUE(untouched) << "extent " << i << ", layer " << layer;
        } else {
          EXPECT_TRUE(whole || untouched) << "extent " << i << ", layer " << layer;
        }
      }
    }
  }

  static void wait(const Ended& one) {
    for (int i = 0; i < 20'000 && one.calls == 0; ++i) usleep(500);
    ASSERT_EQ(one.calls, 1);
  }

  static void expect_no_good_one_is_corrupt(const std::vector<ScatterOutcome>& outcomes) {
    for (size_t i = 0; i < kExtents; ++i)
      EXPECT_NE(outcomes[i], i == kBadExtent ? ScatterOutcome::ok : ScatterOutcome::corrupt)
          << "extent " << i;
  }
  void expect_all_is_well(std::byte* base) {
    EXPECT_EQ(store_all(base), kExtents);
    for (int round = 0; round < 20; ++round) {  // as many extents as there are places for them in flight
      const auto outcomes = load_all(base);
      for (size_t i = 0; i < kExtents; ++i)
        EXPECT_EQ(outcomes[i], i == kBadExtent ? ScatterOutcome::corrupt : ScatterOutcome::ok)
            << "extent " << i;
    }
  }

  CacheForm form_;
  uint32_t per_extent_ = 0;
  uint64_t payload_bytes_ = 0;
  std::unique_ptr<Device> device_;
  std::unique_ptr<DeviceMemory> memory_;
  std::vector<uint8_t> cells_;
  PagedCache cache_;
  std::byte* slab_ = nullptr;
  std::vector<std::byte> ordinary_;  // memory that the device does not reach
  uint64_t calls_of_stores_ = 0;     // that were ordered to fail
  uint64_t calls_of_loads_ = 0;
};

class FailedCall : public FailedCalls, public ::testing::WithParamInterface<const char*> {};

TEST_P(FailedCall, EndsItsWorkAndLeavesNothingForTheNext) {
  expect_all_is_well(slab_);
  uint64_t met = 0;
  for (std::byte* const base : {slab_, ordinary_.data()}) {
    for (const uint64_t nth : {1, 2, 3, 6, 11}) {
      for (const uint64_t more : {0, 2}) {
        SCOPED_TRACE(::testing::Message() << "call " << nth << " and " << more << " more, "
                                          << (base == slab_ ? "slab" : "ordinary memory"));
        fake_cuda::fail(GetParam(), nth, cudaErrorUnknown, more);
        const size_t stored = store_all(base);
        if (calls_of_stores_ < nth) {
          EXPECT_EQ(stored, kExtents);
        }
        fake_cuda::fail(GetParam(), nth, cudaErrorUnknown, more);
        expect_no_good_one_is_corrupt(load_all(base));
        if (calls_of_stores_ >= nth || calls_of_loads_ >= nth) ++met;
        if (HasFatalFailure()) return;
      }
    }
    expect_all_is_well(base);
  }
  EXPECT_GT(met, 0u) << "the call is never made: the test shows nothing";
}

INSTANTIATE_TEST_SUITE_P(Of, FailedCall,
                         ::testing::Values("cudaMemcpyAsync", "cudaMemcpy2DAsync", "cudaEventRecord",
                                           "cudaEventQuery", "cudaEventSynchronize", "launch_gather",
                                           "launch_verify", "launch_scatter"),
                         [](const auto& tested) { return std::string(tested.param); });

/// Of more than one part, which the copiers share.
class FailedPart : public FailedCalls {
 protected:
  FailedPart() : FailedCalls(24, 1024) {}

  void expect_to_end_behind_what_is_on_its_way(Load& load, ScatterOutcome expected) {
    fake_cuda::hold_copies();
    device_->submit(&load.work);
    usleep(20'000);
    const int ended_early = load.ended.calls;
    fake_cuda::let_copies_go();
    wait(load.ended);
    EXPECT_EQ(load.ended.outcome, expected);
    EXPECT_TRUE(ended_early == 0) << "the rest of its payload was still to come";
  }
};

TEST_F(FailedPart, EndsItsLoadWhenNothingOfItIsOnItsWayAnyMore) {
  for (const char* const call : {"cudaMemcpyAsync", "cudaEventRecord", "cudaStreamWaitEvent"}) {
    for (int round = 0; round < 10; ++round) {
      SCOPED_TRACE(::testing::Message() << call << ", round " << round);
      Load load;
      make_load(ordinary_.data(), 0, load);
      fake_cuda::fail(call, 2);  // what the first one copies is held
      expect_to_end_behind_what_is_on_its_way(load, ScatterOutcome::failed);
      fake_cuda::stop_failing();
    }
  }
}

TEST_F(FailedPart, OfAFileCutShortEndsItsLoadWhenNothingOfItIsOnItsWayAnyMore) {
  const TemporaryDirectory directory("/dev/shm");
  const File file = std::move(*File::open(directory.path() + "/segment", {.write = true, .create = true}));
  for (int round = 0; round < 5; ++round) {
    ASSERT_TRUE(file.truncate(payload_bytes_));
    const Mapping mapping = std::move(*Mapping::map(file, payload_bytes_, true));
    Load load;
    make_load(mapping.data(), 0, load);
    load.work.guarded = true;
    ASSERT_TRUE(file.truncate(5 << 20));  // in the second part
    expect_to_end_behind_what_is_on_its_way(load, ScatterOutcome::gone);
  }
}

TEST_F(FailedPart, FailsItsLoadAndHarmsNoOther) {
  ASSERT_GT(payload_bytes_, 4ull << 20);
  for (const char* const call :
       {"cudaMemcpyAsync", "cudaEventRecord", "cudaEventSynchronize", "cudaStreamWaitEvent"}) {
    uint64_t met = 0;
    for (const uint64_t nth : {1, 2, 3, 4, 7}) {
      SCOPED_TRACE(::testing::Message() << call << ", call " << nth);
      fake_cuda::fail(call, nth);
      expect_no_good_one_is_corrupt(load_all(ordinary_.data()));
      if (calls_of_loads_ >= nth) ++met;
      if (HasFatalFailure()) return;
    }
    EXPECT_GT(met, 0u) << call << " is never made: the test shows nothing";
  }
  EXPECT_EQ(store_all(ordinary_.data()), kExtents);
  const auto outcomes = load_all(ordinary_.data());
  for (size_t i = 0; i < kExtents; ++i)
    EXPECT_EQ(outcomes[i], i == kBadExtent ? ScatterOutcome::corrupt : ScatterOutcome::ok) << "extent " << i;
}

TEST_F(FailedCalls, ThatWouldClearWhatAFailedVerifyFoundAreMadeUpFor) {
  for (int round = 0; round < 10; ++round) {
    for (uint64_t nth = 1; nth <= kExtents; ++nth) {
      fake_cuda::fail("launch_scatter", nth);
      fake_cuda::fail("cudaMemsetAsync", 1, cudaErrorUnknown, kExtents);
      expect_no_good_one_is_corrupt(load_all(slab_));
      expect_no_good_one_is_corrupt(load_all(slab_));
    }
  }
  expect_all_is_well(slab_);
}

class FailedStart : public ::testing::TestWithParam<const char*> {};

TEST_P(FailedStart, IsAnErrorAndGivesEverythingBack) {
  size_t before = 0, after = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&before, &total), cudaSuccess);
  uint64_t met = 0;
  for (uint64_t nth = 1; nth < 400; ++nth) {
    fake_cuda::fail(GetParam(), nth);
    const auto made = make_cuda_device(0, 8ull << 20, 8ull << 20, 2);
    if (fake_cuda::stop_failing() < nth) {
      EXPECT_TRUE(made) << made.error().message;
      break;
    }
    ++met;
    ASSERT_FALSE(made) << "call " << nth;
    EXPECT_FALSE(made.error().message.empty());
  }
  EXPECT_GT(met, 0u) << "the call is never made: the test shows nothing";
  ASSERT_EQ(cudaMemGetInfo(&after, &total), cudaSuccess);
  EXPECT_EQ(before, after);
}

INSTANTIATE_TEST_SUITE_P(Of, FailedStart,
                         ::testing::Values("cudaGetDeviceCount", "cudaMalloc", "cudaHostAlloc",
                                           "cudaHostRegister", "cudaMemGetInfo", "cudaStreamCreateWithFlags",
                                           "cudaEventCreateWithFlags", "cudaMemsetAsync", "load_kernels"),
                         [](const auto& tested) { return std::string(tested.param); });

}  // namespace
}  // namespace tokendepot::testing
