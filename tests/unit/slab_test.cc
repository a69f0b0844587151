#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "device/host_slab.h"

namespace tokendepot {
namespace {

TEST(Slab, RangesAreAlignedAndDoNotOverlap) {
  HostSlab slab(64 * kPageBytes);
  std::byte* a = slab.allocate(1);
  std::byte* b = slab.allocate(kPageBytes + 1);
  std::byte* c = slab.allocate(kPageBytes);
  ASSERT_TRUE(a && b && c);
  for (const std::byte* range : {a, b, c}) EXPECT_EQ(reinterpret_cast<uintptr_t>(range) % kPageBytes, 0u);
  std::memset(a, 1, kPageBytes);
  std::memset(b, 2, 2 * kPageBytes);
  std::memset(c, 3, kPageBytes);
  EXPECT_EQ(a[kPageBytes - 1], std::byte{1});
  EXPECT_EQ(b[0], std::byte{2});
  EXPECT_EQ(b[2 * kPageBytes - 1], std::byte{2});
  EXPECT_EQ(c[0], std::byte{3});
}

TEST(Slab, SizeIsRoundedUpToPages) {
  EXPECT_EQ(HostSlab(3 * kPageBytes + 1).size(), 4 * kPageBytes);
}

TEST(Slab, AnswersNullWhenFullAndServesAgainAfterRelease) {
  HostSlab slab(4 * kPageBytes);
  std::byte* all = slab.allocate(4 * kPageBytes);
  ASSERT_NE(all, nullptr);
  EXPECT_EQ(slab.allocate(1), nullptr);
  slab.release(all);
  EXPECT_EQ(slab.allocate(4 * kPageBytes), all);
}

TEST(Slab, AnswersNullForNothingAndForMoreThanItHas) {
  HostSlab slab(4 * kPageBytes);
  EXPECT_EQ(slab.allocate(0), nullptr);
  EXPECT_EQ(slab.allocate(4 * kPageBytes + 1), nullptr);
  EXPECT_EQ(slab.allocate(UINT64_MAX), nullptr);
  EXPECT_EQ(HostSlab(0).allocate(1), nullptr);
}

TEST(Slab, TakesTheFirstGapThatFits) {
  HostSlab slab(10 * kPageBytes);
  std::byte* a = slab.allocate(kPageBytes);
  std::byte* b = slab.allocate(2 * kPageBytes);
  std::byte* c = slab.allocate(kPageBytes);
  std::byte* d = slab.allocate(3 * kPageBytes);
  std::byte* e = slab.allocate(kPageBytes);
  ASSERT_TRUE(a && b && c && d && e);
  slab.release(b);
  slab.release(d);
  EXPECT_EQ(slab.allocate(3 * kPageBytes), d);
  EXPECT_EQ(slab.allocate(kPageBytes), b);
  EXPECT_EQ(slab.allocate(kPageBytes), b + kPageBytes);
}

TEST(Slab, NeighboursMergeInWhateverOrderTheyAreReleased) {
  std::vector<int> order{0, 1, 2, 3};
  do {
    HostSlab slab(4 * kPageBytes);
    std::vector<std::byte*> ranges;
    for (int i = 0; i < 4; ++i) ranges.push_back(slab.allocate(kPageBytes));
    for (const int i : order) slab.release(ranges[i]);
    EXPECT_NE(slab.allocate(4 * kPageBytes), nullptr);
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(Slab, RandomUseNeverHandsOutAByteTwice) {
  constexpr uint64_t kPages = 96;
  HostSlab slab(kPages * kPageBytes);
  std::byte* base = slab.allocate(kPages * kPageBytes);
  slab.release(base);

  std::mt19937 random(7);
  std::map<std::byte*, uint64_t> held;
  std::vector<bool> taken(kPages);
  const auto mark = [&](std::byte* range, uint64_t pages, bool to) {
    for (uint64_t page = uint64_t(range - base) / kPageBytes; pages-- > 0; ++page) {
      ASSERT_LT(page, kPages);
      ASSERT_EQ(taken[page], !to);
      taken[page] = to;
    }
  };
  for (int step = 0; step < 20'000; ++step) {
    if (random() % 2 == 0) {
      const uint64_t pages = 1 + random() % 12;
      std::byte* range = slab.allocate(pages * kPageBytes);
      uint64_t longest_gap = 0, gap = 0;
      for (const bool page : taken) longest_gap = std::max(longest_gap, gap = page ? 0 : gap + 1);
      ASSERT_EQ(range != nullptr, longest_gap >= pages);
      if (range == nullptr) continue;
      mark(range, pages, true);
      held.emplace(range, pages);
    } else if (!held.empty()) {
      const auto victim = std::next(held.begin(), random() % held.size());
      mark(victim->first, victim->second, false);
      slab.release(victim->first);
      held.erase(victim);
    }
  }
}

TEST(Slab, ThreadsShareItWithoutOverlap) {
  HostSlab slab(32 * kPageBytes);
  const auto use = [&slab](int value) {
    for (int i = 0; i < 2'000; ++i) {
      const uint64_t bytes = (1 + uint64_t(i) % 5) * kPageBytes;
      std::byte* range = slab.allocate(bytes);
      if (range == nullptr) continue;
      std::memset(range, value, bytes);
      const bool intact =
          std::all_of(range, range + bytes, [&](std::byte b) { return b == std::byte(value); });
      slab.release(range);
      ASSERT_TRUE(intact);
    }
  };
  std::thread a(use, 1), b(use, 2), c(use, 3);
  a.join();
  b.join();
  c.join();
  EXPECT_NE(slab.allocate(32 * kPageBytes), nullptr);
}

TEST(SlabDeathTest, ReleaseOfARangeThatIsNotHeldIsABug) {
  HostSlab slab(4 * kPageBytes);
  std::byte* range = slab.allocate(kPageBytes);
  EXPECT_DEATH(slab.release(range + kPageBytes), "check failed");
  slab.release(range);
  EXPECT_DEATH(slab.release(range), "check failed");
}

}  // namespace
}  // namespace tokendepot
