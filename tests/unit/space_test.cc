// The space of a root: what the figures say of it, and what happens where nothing can be given back.
#include <algorithm>
#include <ctime>

#include "tokendepot/tools.h"
#include "transfers_fixture.h"

namespace tokendepot::testing {
namespace {

class SpaceOn : public TransfersOn {
 protected:
  std::string root() const { return directory_.path() + "/root"; }
  uint64_t bytes_on_the_medium() const {
    uint64_t total = 0;
    for (const auto& file : std::filesystem::directory_iterator(root() + "/segments")) {
      std::error_code gone;
      if (const auto bytes = file.file_size(gone); !gone) total += bytes;
    }
    return total;
  }
  /// One chunk. False: dropped.
  bool store_one(Depot& depot, uint32_t prompt) {
    return store_chunks(depot, ++next_job_, ns_, prompt_keys(ns_, prompt, 1), 0, 1).items_ok == 1;
  }
};

// C2: a figure that runs away, or below 0, would end eviction or fill the disk.
TEST_P(SpaceOn, AfterAnyOperationsTheUsedBytesAreThoseOfTheFiles) {
  constexpr int kOperations = 4000;
  constexpr uint64_t kCapacity = 8 << 20;
  Options small = options(kCapacity);
  small.eviction_grace_ms = 20;
  auto depot = open(small);
  ASSERT_TRUE(depot->attach(cache_.paged()));
  std::mt19937 random(20261127);
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  const auto check_at_rest = [&] {
    // At rest for a moment: the keeper makes the next segment ready, and what is evicted goes after its
    // grace.
    const auto end = std::chrono::steady_clock::now() + 30s;
    uint64_t used = 0;
    uint64_t files = 1;
    for (int same = 0; same < 3 && std::chrono::steady_clock::now() < end; usleep(20'000)) {
      files = bytes_on_the_medium();
      used = depot->stats().roots[0].used_bytes;
      same = used == files ? same + 1 : 0;
    }
    EXPECT_EQ(used, files);
    EXPECT_LE(files, kCapacity);
  };
  for (int n = 1; n <= kOperations; ++n) {
    const uint32_t prompt = below(300);
    const auto keys = prompt_keys(ns_, prompt, 1);
    std::vector<uint8_t> known(1);
    switch (below(100)) {
      case 0:
        depot.reset();
        depot = open(small);
        ASSERT_TRUE(depot->attach(cache_.paged()));
        break;
      case 1:
      case 2:
        depot->condemn(keys, want_, known);
        break;
      case 3:
      case 4:
        depot->forget(keys[0], 0);
        break;
      default:
        if (below(3) == 0 && depot->longest_prefix(keys, std::vector{want_}) == 1) {
          if (const auto plan = plan_chunks(*depot, ns_, keys, want_, 0, 1, 0)) load(*depot, *plan);
        } else {
          store_one(*depot, prompt);
        }
    }
    ASSERT_LE(depot->stats().roots[0].used_bytes, kCapacity);
    if (n % 500 == 0) check_at_rest();
  }
}

// C3: what is pinned and what others fill cannot go.
TEST_P(SpaceOn, WithEverythingPinnedStoresAreDroppedAtOnceAndNobodySpins) {
  const Options small = options(4 << 20);
  auto other = open(small);
  ASSERT_TRUE(set_policy(root(), {Policy::Kind::pin, ns_, 0, 0, {}}, 4 << 20));
  ASSERT_TRUE(other->attach(cache_.paged()));
  until_stored(
      [&] { return store_one(*other, 1); });  // and so it fills one segment and has another one ready
  auto depot = open(small);
  HostCache cache(small_shape(), kBlocks);
  ASSERT_TRUE(depot->attach(cache.paged()));
  uint32_t prompt = 2;
  const auto pinned = [&] { return depot->stats().store.failures.pinned; };
  for (const auto end = std::chrono::steady_clock::now() + 60s;
       pinned() == 0 && std::chrono::steady_clock::now() < end;) {
    if (!store_one(*depot, prompt++)) usleep(10'000);
  }
  ASSERT_GT(pinned(), 0u);

  const auto cpu_seconds = [] {
    timespec spent{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
    return static_cast<double>(spent.tv_sec) + static_cast<double>(spent.tv_nsec) * 1e-9;
  };
  const double before = cpu_seconds();
  auto refusal = std::chrono::steady_clock::duration::max();
  for (int n = 0; n < 10; ++n) {
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_FALSE(store_one(*depot, prompt++));
    refusal = std::min(refusal, std::chrono::steady_clock::now() - begin);
    usleep(100'000);
  }
  EXPECT_LT(refusal, 1s) << "which is how long a store waits for what may come";
  EXPECT_LT(cpu_seconds() - before, 0.3) << "of two processes' threads in a second";
  EXPECT_EQ(other->longest_prefix(prompt_keys(ns_, 1, 1), std::vector{want_}), 1u) << "others are served";

  ASSERT_EQ(*drop_policies(root(), Policy::Kind::pin, ns_, std::nullopt), 1u);
  until_stored([&] { return store_one(*depot, prompt++); });
}

INSTANTIATE_TEST_SUITE_P(Roots, SpaceOn, ::testing::Values("tmpfs", "disk"),
                         [](const auto& suite) { return suite.param; });

}  // namespace
}  // namespace tokendepot::testing
