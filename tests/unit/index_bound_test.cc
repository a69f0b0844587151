#include "store/index_bound.h"

#include <gtest/gtest.h>

namespace tokendepot {
namespace {

constexpr uint64_t kCapacity = 64 << 20;
constexpr uint64_t kLeast = 8192;

TEST(IndexBound, AFileHasNoExtentBehindItsEndAndNoMoreThanFit) {
  IndexBound bound(kCapacity);
  bound.found(3, 10 * kLeast);
  EXPECT_TRUE(bound.fits(3, 10 * kLeast));
  EXPECT_FALSE(bound.fits(3, 10 * kLeast + 4096));
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(bound.has_room(3)) << i;
    bound.added(3);
  }
  EXPECT_FALSE(bound.has_room(3));
  EXPECT_TRUE(bound.has_room(2)) << "another segment";
}

TEST(IndexBound, FilesOfUnknownSizeAreBelievedAMillionTimes) {
  IndexBound bound(kCapacity);
  for (uint64_t i = 0; i < IndexBound::kOnTheirWord; ++i) {
    ASSERT_FALSE(bound.must_ask(static_cast<uint32_t>(i % 5), kLeast));
    ASSERT_TRUE(bound.fits(static_cast<uint32_t>(i % 5), kLeast));
  }
  EXPECT_FALSE(bound.fits(1, kLeast));
  EXPECT_TRUE(bound.must_ask(1, kLeast));
  EXPECT_FALSE(bound.must_ask(1, kLeast)) << "once a round";
  bound.new_round();
  EXPECT_TRUE(bound.must_ask(1, kLeast));
  bound.found(1, kLeast);
  EXPECT_FALSE(bound.must_ask(1, kLeast));
  EXPECT_TRUE(bound.fits(1, kLeast));
}

TEST(IndexBound, AFileThatHasGrownIsAskedAgain) {
  IndexBound bound(kCapacity);
  bound.found(0, kLeast);
  EXPECT_TRUE(bound.must_ask(0, 2 * kLeast));
  bound.found(0, 2 * kLeast);
  EXPECT_TRUE(bound.fits(0, 2 * kLeast));
}

TEST(IndexBound, FilesThatAreLargerThanTheRootAreBelievedUpToItsCapacity) {
  IndexBound bound(kCapacity);
  bound.found(0, uint64_t{1} << 40);
  uint64_t added = 0;
  for (; bound.has_room(0) && added < 4 * IndexBound::kOnTheirWord; ++added) bound.added(0);
  EXPECT_EQ(added, kCapacity / kLeast + IndexBound::kOnTheirWord);
  // What is condemned is in the index until it was swept.
  bound.condemned(0);
  EXPECT_FALSE(bound.has_room(1));
  bound.swept();
  EXPECT_TRUE(bound.has_room(1));
}

}  // namespace
}  // namespace tokendepot
