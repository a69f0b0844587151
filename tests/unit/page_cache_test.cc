// Roots whose file system refuses O_DIRECT where it could not be tried: what went through the page cache is
// called and counted so.
#include <fcntl.h>

#include "base/log.h"
#include "depot_fixture.h"
#include "forked_child.h"
#include "io/file.h"

namespace tokendepot::testing {
namespace {

constexpr size_t kChunks = 3;
constexpr int32_t kElsewhere = 32;

class PageCache : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!probe_direct_alignment(directory_.path())) GTEST_SKIP() << "/var/tmp has no O_DIRECT";
    options_.roots = {
        {.path = directory_.path() + "/root", .capacity_bytes = 16 << 20, .segment_bytes = 1 << 20}};
    options_.slab_bytes = 4 << 20;
    options_.free_space_reserve = 0;
    cache_.fill(1);
    auto depot = open_attached(options_, ns_, cache_);
    keys_ = prompt_keys(ns_, 1, kChunks);
    uint64_t job = 1;
    store_until_all_are(*depot, job, ns_, keys_, 0, kChunks);
    EXPECT_EQ(depot->stats().store.by_path.buffered, 0u);
    EXPECT_GT(depot->stats().store.by_path.direct, 0u);
    options_.roots[0].read_only = true;
  }
  std::unique_ptr<Depot> open_read_only() {
    auto depot = Depot::open(options_);
    EXPECT_TRUE(depot) << depot.error().message;
    EXPECT_TRUE((*depot)->attach(cache_.paged()));
    return std::move(*depot);
  }
  std::string transport_of(Depot& depot) { return depot.stats().roots.at(0).transport; }
  PathBytes load_all(Depot& depot) {
    const auto plan = plan_chunks(depot, ns_, keys_, want_of(small_shape()), 0, kChunks, kElsewhere);
    EXPECT_TRUE(plan);
    EXPECT_TRUE(depot.submit_load(7, *plan));
    EXPECT_EQ(wait_for(depot, 7).items_ok, kChunks);
    for (int32_t b = 0; b < static_cast<int32_t>(kChunks * kBlocksPerChunk); ++b)
      EXPECT_EQ(cache_.block(kElsewhere + b), cache_.block(b)) << b;
    return depot.stats().load.by_path;
  }

  const TemporaryDirectory directory_{"/var/tmp"};
  Options options_;
  HostCache cache_{small_shape(), 64};
  NamespaceDigest ns_;
  std::vector<Key> keys_;
};

TEST_F(PageCache, AReadOnlyRootIsDirectWhereItsSegmentsAre) {
  const auto depot = open_read_only();
  EXPECT_EQ(transport_of(*depot), "direct-threads");
  const PathBytes loaded = load_all(*depot);
  EXPECT_GT(loaded.direct, 0u);
  EXPECT_EQ(loaded.buffered, 0u);
}

TEST_F(PageCache, AReadOnlyRootIsBufferedWhereItsSegmentsRefuseDirectIo) {
  EXPECT_EQ(exit_code_of_child([&] {
              if (!forbid_open_flag(O_DIRECT, EINVAL)) return 1;
              const auto depot = open_read_only();
              EXPECT_EQ(transport_of(*depot), "buffered-threads");
              EXPECT_NE(depot->stats().roots.at(0).reason.find("O_DIRECT refused"), std::string::npos);
              const PathBytes loaded = load_all(*depot);
              EXPECT_EQ(loaded.direct, 0u);
              EXPECT_GT(loaded.buffered, 0u);
              return HasFailure() ? 2 : 0;
            }),
            0);
}

TEST_F(PageCache, WhatIsRefusedOnlyWhenItIsOpenedIsCountedAsBufferedAndToldOnce) {
  EXPECT_EQ(exit_code_of_child([&] {
              int told = 0;
              set_log_sink([&told](LogLevel, std::string_view line) {
                told += static_cast<int>(line.contains("O_DIRECT refused"));
              });
              auto depot = open_read_only();
              if (!forbid_open_flag(O_DIRECT, EINVAL)) return 1;
              const PathBytes loaded = load_all(*depot);
              EXPECT_EQ(loaded.direct, 0u);
              EXPECT_GT(loaded.buffered, 0u);
              depot.reset();
              set_log_sink(nullptr);
              EXPECT_EQ(told, 1);
              return HasFailure() ? 2 : 0;
            }),
            0);
}

TEST_F(PageCache, DirectIsRefusedAtTheStartOnAReadOnlyRootToo) {
  options_.roots[0].transport = TransportChoice::direct;
  EXPECT_EQ(exit_code_of_child([&] {
              if (!Depot::open(options_)) return 1;
              if (!forbid_open_flag(O_DIRECT, EINVAL)) return 2;
              const auto refused = Depot::open(options_);
              if (refused) return 3;
              return refused.error().message.contains("transport=direct is not possible here") ? 0 : 4;
            }),
            0);
}

}  // namespace
}  // namespace tokendepot::testing
