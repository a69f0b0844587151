// Transfers and all that they need, over a device that records.
#pragma once

#include <gmock/gmock.h>

#include "depot_fixture.h"
#include "recording_device.h"
#include "store/catalog.h"
#include "store/replay.h"
#include "transfer/transfers.h"

namespace tokendepot::testing {

class TransfersOnDevice : public ::testing::Test {
 protected:
  explicit TransfersOnDevice(Options options = {}, RootOptions root = {}) {
    root.path = directory_.path() + "/root";
    root.capacity_bytes = 16 << 20;
    root.segment_bytes = 1 << 20;
    options.roots = {root};
    root_ = std::move(*Root::open(options.roots[0], 0, options, &device_));
    replay_ = std::make_unique<Replay>(*root_, segments_, &catalog_);
    EXPECT_TRUE(replay_->first());
    writer_ = std::move(*RootWriter::open(*root_, *replay_, segments_, system_clock(), 0));
    transfers_ =
        std::make_unique<Transfers>(device_, std::vector{Transfers::Tier{root_.get(), writer_.get()}},
                                    segments_, system_clock(), 64 << 20);
    promotion_ = std::make_unique<Promotion>(
        std::vector{Keeper::Tier{root_.get(), replay_.get(), writer_.get()}}, segments_, system_clock());
    rewriting_ = std::make_unique<Rewriting>(0, promotion_->use(), segments_, system_clock());
    keeper_ = std::make_unique<Keeper>(std::vector{Keeper::Tier{root_.get(), replay_.get(), writer_.get()}},
                                       segments_, &catalog_, *promotion_, *rewriting_, 20,
                                       [this] { transfers_->space_ready(); });
    EXPECT_TRUE(transfers_->attach(cache_.paged()));
    cache_.fill(1);
  }
  ~TransfersOnDevice() override {
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
    ASSERT_THAT(transfers_->poll(), ::testing::SizeIs(1));
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
  /// One extent as often as that.
  LoadPlan plan_many(uint32_t count, size_t chunk = 0) {
    LoadPlan many = plan(chunk);
    for (uint32_t i = 1; i < count; ++i) {
      LoadItem item = many.items[0];
      item.chunk = i;
      many.items.push_back(std::move(item));
    }
    return many;
  }
  Completion completion_of(uint64_t job) {
    for (int i = 0; i < 10'000; ++i, usleep(1000)) {
      for (const Completion& done : transfers_->poll()) {
        if (done.job == job) return done;
      }
    }
    ADD_FAILURE() << "never reported";
    return {};
  }
  uint32_t ended(uint64_t job) { return completion_of(job).items_ok; }

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
  std::unique_ptr<Promotion> promotion_;
  std::unique_ptr<Rewriting> rewriting_;
  std::unique_ptr<Transfers> transfers_;
  std::unique_ptr<Keeper> keeper_;
};

}  // namespace tokendepot::testing
