// A medium that takes no more, seen from a whole depot: what was acknowledged is exact after a restart, the
// rest is dropped and counted, and stores come back when there is space again.
#include <sys/resource.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "depot_fixture.h"
#include "forked_child.h"

namespace tokendepot::testing {
namespace {

constexpr uint32_t kBlocks = 512;
constexpr size_t kChunks = kBlocks / kBlocksPerChunk;

struct Way {
  const char* name;
  TransportChoice transport;
  IoChoice io;
};

class FullMedium : public ::testing::TestWithParam<Way> {
 protected:
  FullMedium() : directory_("/dev/shm"), cache_(small_shape(), kBlocks) {}

  Options options() const {
    Options options;
    options.roots = {{.path = directory_ / "root",
                      .capacity_bytes = 12 << 20,
                      .segment_bytes = 1 << 20,
                      .transport = GetParam().transport,
                      .io = GetParam().io}};
    options.slab_bytes = 8 << 20;
    options.free_space_reserve = 0;
    options.eviction_grace_ms = 0;
    options.poll_ms = 20;
    return options;
  }
  std::unique_ptr<Depot> open() {
    auto depot = Depot::open(options());
    if (!depot) {
      ADD_FAILURE() << depot.error().message;
      return nullptr;
    }
    ns_ = *(*depot)->register_namespace(R"({"model":"m"})");
    EXPECT_TRUE((*depot)->attach(cache_.paged()));
    return std::move(*depot);
  }
  /// One job for each chunk of a prompt, all in flight at once; which of them were acknowledged.
  std::set<size_t> store_at_once(Depot& depot, std::span<const Key> keys) {
    for (size_t i = 0; i < keys.size(); ++i) {
      StorePlan plan;
      plan.ns = ns_;
      plan.items.push_back({keys[i], static_cast<uint32_t>(i), 0,
                            iota_blocks(static_cast<int32_t>(i * kBlocksPerChunk), kBlocksPerChunk)});
      EXPECT_TRUE(depot.submit_store(100 + i, plan));
    }
    EXPECT_TRUE(depot.flush(20s));
    std::set<size_t> acknowledged;
    size_t reported = 0;
    for (int i = 0; i < 500 && reported < keys.size(); ++i) {
      for (const Completion& done : depot.poll()) {
        ++reported;
        if (done.items_ok == 1) acknowledged.insert(done.job - 100);
      }
      depot.wait_ended(20ms);
    }
    EXPECT_EQ(reported, keys.size());
    return acknowledged;
  }
  /// Takes all that is left of the file system but for `spare` bytes.
  void fill_up(uint64_t spare) {
    std::ofstream other(directory_ / "another-tenant", std::ios::binary);
    const std::vector<char> block(64 << 10, 'x');
    while (std::filesystem::space(directory_.path()).available > spare + block.size()) {
      if (!other.write(block.data(), static_cast<std::streamsize>(block.size())).flush()) break;
    }
  }

  TemporaryDirectory directory_;
  HostCache cache_;
  NamespaceDigest ns_;
};

// D2.
TEST_P(FullMedium, WhatWasAcknowledgedIsExactAndTheRestIsDroppedAndCounted) {
  if (!directory_.mount_tmpfs("size=16m")) GTEST_SKIP() << "cannot mount";
  cache_.fill(1);
  std::vector<Key> keys;
  std::set<size_t> acknowledged;
  {
    const auto depot = open();
    ASSERT_NE(depot, nullptr);
    keys = prompt_keys(ns_, 1, kChunks);
    fill_up(2 << 20);
    acknowledged = store_at_once(*depot, keys);
    EXPECT_GE(depot->stats().store.failures.dropped + depot->stats().store.failures.io_error,
              kChunks - acknowledged.size());
  }
  std::filesystem::remove(directory_ / "another-tenant");
  const auto depot = open();
  ASSERT_NE(depot, nullptr);
  HostCache expected(small_shape(), kBlocks);
  expected.fill(1);
  cache_.clear();
  const GroupWant want = want_of(small_shape());
  std::vector<uint8_t> have(kChunks);
  depot->stored(keys, want, have);
  size_t exact = 0;
  for (size_t i = 0; i < kChunks; ++i) {
    if (have[i] == 0) continue;  // evicted for a later one, or never stored
    auto plan = plan_chunks(*depot, ns_, keys, want, i, i + 1, static_cast<int32_t>(i * kBlocksPerChunk));
    ASSERT_TRUE(plan) << plan.error().message;
    ASSERT_TRUE(depot->submit_load(1000 + i, std::move(*plan)));
    ASSERT_EQ(wait_for(*depot, 1000 + i).items_ok, 1u) << i;
    for (size_t b = i * kBlocksPerChunk; b < (i + 1) * kBlocksPerChunk; ++b)
      ASSERT_EQ(cache_.block(static_cast<int32_t>(b)), expected.block(static_cast<int32_t>(b))) << i;
    ++exact;
  }
  if (!acknowledged.empty()) {
    EXPECT_GT(exact, 0u) << "those that were not evicted for later ones";
  }
  // And with space again, stores come back without a restart.
  cache_.fill(2);
  EXPECT_FALSE(store_at_once(*depot, prompt_keys(ns_, 2, 8)).empty());
}

TEST_P(FullMedium, IsOpenedAndServesWhatItHolds) {
  if (!directory_.mount_tmpfs("size=16m")) GTEST_SKIP() << "cannot mount";
  Options wanted = options();
  wanted.roots[0].transport =
      TransportChoice::direct;  // which is tried out in a file, for which there is no room
  cache_.fill(1);
  std::vector<Key> keys;
  {
    auto depot = Depot::open(wanted);
    if (!depot) GTEST_SKIP() << depot.error().message;  // no direct I/O on this tmpfs
    ns_ = *(*depot)->register_namespace(R"({"model":"m"})");
    ASSERT_TRUE((*depot)->attach(cache_.paged()));
    keys = prompt_keys(ns_, 1, 1);
    ASSERT_EQ(store_at_once(**depot, keys).size(), 1u);
    fill_up(0);
    // The last pages, which take no whole block.
    std::ofstream(directory_ / "rest", std::ios::binary) << std::string(1 << 20, 'x');
  }
  const auto depot = Depot::open(wanted);
  ASSERT_TRUE(depot) << depot.error().message;
  ASSERT_TRUE((*depot)->attach(cache_.paged()));
  auto plan = plan_chunks(**depot, ns_, keys, want_of(small_shape()), 0, 1, 0);
  ASSERT_TRUE(plan) << plan.error().message;
  ASSERT_TRUE((*depot)->submit_load(1, std::move(*plan)));
  EXPECT_EQ(wait_for(**depot, 1).items_ok, 1u);
}

// D1.
TEST_P(FullMedium, AFileSizeLimitFailsTheStoresAndLeavesNothing) {
  EXPECT_EQ(exit_code_of_child([&] {
              const rlimit limit{512 << 10, 512 << 10};  // smaller than a segment
              if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 1;
              const auto depot = open();
              if (!depot) return 2;
              cache_.fill(3);
              const auto keys = prompt_keys(ns_, 3, 4);
              if (!store_at_once(*depot, keys).empty()) return 3;
              const GroupWant want = want_of(small_shape());
              return depot->longest_prefix(keys, std::span(&want, 1)) == 0 ? 0 : 4;
            }),
            0);
  EXPECT_TRUE(std::filesystem::is_empty(directory_ / "root/segments")) << "a part of a segment was left";
  const auto depot = open();
  ASSERT_NE(depot, nullptr);
  cache_.fill(3);
  EXPECT_FALSE(store_at_once(*depot, prompt_keys(ns_, 3, 4)).empty());
}

INSTANTIATE_TEST_SUITE_P(Ways, FullMedium,
                         ::testing::Values(Way{"mapped", TransportChoice::mapped, IoChoice::automatic},
                                           Way{"threads", TransportChoice::buffered, IoChoice::threads},
                                           Way{"uring", TransportChoice::buffered, IoChoice::uring}),
                         [](const auto& way) { return std::string(way.param.name); });

}  // namespace
}  // namespace tokendepot::testing
