// Stores that cuFile fails: what was gathered goes to the medium the ordinary way.
#include <sys/resource.h>

#include "forked_child.h"
#include "gds_depot_fixture.h"

namespace tokendepot::testing {
namespace {

using Reason = ItemFailure::Reason;

class GdsStore : public GdsDepot {
 protected:
  uint64_t submit(size_t chunk) {
    StorePlan plan;
    plan.ns = ns_;
    plan.items.push_back(
        {keys_[chunk], 0, 0, iota_blocks(static_cast<int32_t>(chunk * kBlocksPerChunk), kBlocksPerChunk)});
    EXPECT_TRUE(depot_->submit_store(++job_, plan));
    return job_;
  }
  /// All of the host's slab but for headers.
  std::byte* take_slab() {
    Slab& slab = device_->slab();
    std::byte* const taken = slab.allocate(slab.size() - header_);
    EXPECT_NE(taken, nullptr);
    return taken;
  }
  template <typename Condition>
  void until(Condition condition) {
    for (int i = 0; i < 10'000 && !condition(); ++i) usleep(1000);
    EXPECT_TRUE(condition());
  }
  size_t served() {
    depot_->refresh();
    return depot_->longest_prefix(keys_, std::vector{want_of(small_shape())});
  }
  /// One store that cuFile fails, and nobody else does any better.
  void expect_not_stored() {
    const Completion done = store(0, 1);
    ASSERT_EQ(done.failures.size(), 1u);
    EXPECT_EQ(done.failures[0].reason, Reason::io_error);
    EXPECT_EQ(errors(), 1u);
    EXPECT_EQ(device_->copies, 1);
    EXPECT_EQ(served(), 0u);
  }
};

TEST_F(GdsStore, AWriteThatCuFileFailsIsDoneTheOrdinaryWay) {
  open();
  cache_.fill(1);
  fake_.fail_writes = 1;
  fake_.fail_with = ENOSPC;
  EXPECT_EQ(store(0, 1).items_ok, 1u);
  EXPECT_EQ(errors(), 1u);
  const DepotStats stats = depot_->stats();
  EXPECT_EQ(stats.store.by_path.direct, payload_ + header_);
  EXPECT_EQ(stats.store.by_path.gds_p2p, 0u);
  EXPECT_DOUBLE_EQ(stats.store.tokens_by_path.direct, kChunkTokens);
  EXPECT_DOUBLE_EQ(stats.store.tokens_by_path.gds_p2p, 0);
  until_stored([&] { return store(1, kChunks).items_ok == kChunks - 1; });
  EXPECT_EQ(errors(), 1u);
  EXPECT_EQ(load_all().items_ok, kChunks);
}

TEST_F(GdsStore, ARootWhoseWritesFailAgainAndAgainGoesOnWithoutCuFile) {
  open();
  cache_.fill(1);
  fake_.fail_writes = -1;
  for (size_t i = 0; i < kChunks; ++i) EXPECT_EQ(store(i, i + 1).items_ok, 1u) << i;
  EXPECT_EQ(errors(), GdsLane::kMostErrors) << "then it is not asked any more";
  EXPECT_NE(logged().find("going on without it"), std::string::npos);
  EXPECT_EQ(transport(), "direct-threads");
  EXPECT_EQ(depot_->stats().store.by_path.direct, kChunks * (payload_ + header_));
  EXPECT_EQ(load_all().items_ok, kChunks);
}

TEST_F(GdsStore, ManyAtOnceThatCuFileFailsAreAllAcknowledged) {
  file_slab_bytes_ = 1 << 20;
  open();
  cache_.fill(1);
  fake_.fail_writes = -1;
  for (size_t i = 0; i < kChunks; ++i) submit(i);
  EXPECT_TRUE(depot_->flush(20s));
  EXPECT_EQ(served(), kChunks);
  EXPECT_EQ(load_all().items_ok, kChunks);
}

TEST_F(GdsStore, AWriteThatCuFileFailsWaitsForStagingAndIsAcknowledged) {
  open();
  cache_.fill(1);
  std::byte* const taken = take_slab();
  fake_.fail_writes = 1;
  submit(0);
  until([&] { return errors() == 1; });
  usleep(50'000);  // it is counted just before it waits
  submit(1);       // there is memory for its header, but whoever is first comes first
  usleep(50'000);
  EXPECT_EQ(depot_->stats().store.extents, 0u);
  EXPECT_EQ(device_->copies, 0);
  device_->slab().release(taken);
  EXPECT_TRUE(depot_->flush(20s));
  EXPECT_EQ(served(), 2u);
  EXPECT_EQ(depot_->stats().store.by_path.direct, payload_ + 2 * header_);
  EXPECT_EQ(depot_->stats().store.by_path.gds_p2p, payload_);
  until_stored([&] { return store(2, kChunks).items_ok == kChunks - 2; });
  EXPECT_EQ(load_all().items_ok, kChunks);
}

TEST_F(GdsStore, WhatWaitsForStagingEndsWithTheDepot) {
  open();
  cache_.fill(1);
  take_slab();
  fake_.fail_writes = 1;
  submit(0);
  until([&] { return errors() == 1; });
  usleep(30'000);
  const auto begin = std::chrono::steady_clock::now();
  depot_.reset();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, 5s);
  open();
  EXPECT_EQ(served(), 0u);
  store_all();
  EXPECT_EQ(load_all().items_ok, kChunks);
}

TEST_F(GdsStore, WhereTheOrdinaryWriteFailsTooItIsAnIoErrorAndNotServed) {
  EXPECT_EQ(exit_code_of_child([&] {
              open();
              cache_.fill(1);
              rlimit before{};
              ::getrlimit(RLIMIT_FSIZE, &before);
              device_->before_copy = [&before] {  // the header is written, and nothing else will be
                const rlimit none{kPageBytes, before.rlim_max};
                ::setrlimit(RLIMIT_FSIZE, &none);
              };
              fake_.fail_writes = 1;
              expect_not_stored();
              device_->before_copy = nullptr;
              ::setrlimit(RLIMIT_FSIZE, &before);
              depot_.reset();
              open();
              if (served() != 0) return 2;
              store_all();
              if (load_all().items_ok != kChunks) return 3;
              depot_.reset();
              return HasFailure() ? 1 : 0;
            }),
            0);
}

TEST_F(GdsStore, WhereTheDeviceCannotBeReadItIsAnIoErrorAndNotServed) {
  open();
  cache_.fill(1);
  fake_.fail_writes = 1;
  device_->fail_copies = true;
  expect_not_stored();
  until([&] { return logged().contains("the device cannot be read"); });
  store_all();
  EXPECT_EQ(load_all().items_ok, kChunks) << "no slab memory was lost";
}

TEST_F(GdsStore, AStoreIntoASegmentThatCuFileDoesNotTakeKeepsItsPlaceWhileItWaitsForStaging) {
  open();
  cache_.fill(1);
  fake_.refuse_files = 5008;
  const auto went_direct = [&] {
    const TransferStats stores = depot_->stats().store;
    return stores.by_path.direct > stores.extents * header_;
  };
  for (uint32_t prompt = 2; !went_direct(); ++prompt) {
    ASSERT_LT(prompt, 100u) << "never in a segment that was refused";
    keys_ = prompt_keys(ns_, prompt, kChunks);
    until_stored([&] { return store(0, 1).items_ok == 1; });
  }
  ASSERT_EQ(transport(), "gds-p2p");
  std::byte* const taken = take_slab();
  const uint64_t waiting = submit(1);
  usleep(100'000);
  EXPECT_EQ(depot_->stats().drops.no_space, 0u);
  device_->slab().release(taken);
  EXPECT_EQ(wait_for(*depot_, waiting).items_ok, 1u);
  EXPECT_EQ(served(), 2u);
}

}  // namespace
}  // namespace tokendepot::testing
