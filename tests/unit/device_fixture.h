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
  struct OpenRoot {
    std::unique_ptr<Root> root;
    std::unique_ptr<Replay> replay;
    std::unique_ptr<RootWriter> writer;
    std::unique_ptr<Promotion> promotion;
    std::unique_ptr<Rewriting> rewriting;
    std::unique_ptr<Keeper> keeper;
  };

  explicit TransfersOnDevice(const Options& options = {}, RootOptions root = {})
      : TransfersOnDevice(options, std::vector{std::move(root)}) {}
  /// Each root has a keeper of its own: a store goes where its keeper is.
  TransfersOnDevice(Options options, std::vector<RootOptions> roots) {
    std::vector<Transfers::Tier> tiers;
    for (RootOptions& root : roots) {
      root.path = directory_.path() + "/root" + (roots_.empty() ? "" : std::to_string(roots_.size()));
      root.capacity_bytes = 16 << 20;
      root.segment_bytes = 1 << 20;
      options.roots = {root};
      OpenRoot& open = roots_.emplace_back();
      open.root = std::move(*Root::open(root, static_cast<RootIndex>(tiers.size()), options, &device_));
      open.replay = std::make_unique<Replay>(*open.root, segments_, &catalog_);
      EXPECT_TRUE(open.replay->first());
      open.writer = std::move(*RootWriter::open(*open.root, *open.replay, segments_, system_clock(), 0));
      tiers.push_back({open.root.get(), open.writer.get()});
    }
    transfers_ = std::make_unique<Transfers>(device_, tiers, segments_, system_clock(), 64 << 20);
    for (OpenRoot& open : roots_) {
      const std::vector tier{Keeper::Tier{open.root.get(), open.replay.get(), open.writer.get()}};
      open.promotion = std::make_unique<Promotion>(tier, segments_, system_clock());
      open.rewriting = std::make_unique<Rewriting>(0, open.promotion->use(), segments_, system_clock());
      open.keeper = std::make_unique<Keeper>(tier, segments_, &catalog_, *open.promotion, *open.rewriting, 20,
                                             [this] { transfers_->space_ready(); });
    }
    EXPECT_TRUE(transfers_->attach(cache_.paged()));
    cache_.fill(1);
  }
  ~TransfersOnDevice() override {
    transfers_->close();
    for (OpenRoot& open : roots_) open.keeper.reset();
    transfers_.reset();
  }

  void submit_store(size_t first, size_t last, size_t root = 0) {
    StorePlan plan;
    plan.ns = ns_;
    for (size_t i = first; i < last; ++i) {
      plan.items.push_back({keys_[i], static_cast<uint32_t>(i), 0,
                            iota_blocks(static_cast<int32_t>(i * kBlocksPerChunk), kBlocksPerChunk)});
    }
    ASSERT_TRUE(transfers_->submit_store(++job_, plan, *roots_[root].keeper));
  }
  void store(size_t first, size_t last) {
    submit_store(first, last);
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
  std::vector<OpenRoot> roots_;
  std::unique_ptr<Transfers> transfers_;
};

}  // namespace tokendepot::testing
