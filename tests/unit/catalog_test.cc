#include "store/catalog.h"

#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <random>

namespace tokendepot {
namespace {

Key key_of(uint64_t n) {
  Key key;
  std::mt19937_64 random(n);
  for (size_t i = 0; i < 4; ++i) {
    const uint64_t value = random();
    std::memcpy(key.bytes.data() + 8 * i, &value, 8);
  }
  return key;
}

PartShape shape_of(Part part, uint16_t group = 0) {
  return {group, LayoutKind::canonical, part, 256};
}
GroupWant want_of(Part part, uint32_t window = 0, uint16_t group = 0) {
  return {group, LayoutKind::canonical, part, 256, window};
}

class CatalogTest : public ::testing::Test {
 protected:
  CatalogTest() {
    slot_ = segments_.slot_of({1, 0});
    segments_.set_present(slot_, 0, 1 << 30);
  }
  void put(uint64_t n, PartId part) { catalog_.put(key_of(n), part, slot_, {{1, 0}, n * 4096, 4096}); }

  SegmentTable segments_;
  Catalog catalog_{segments_};
  uint32_t slot_ = 0;
};

TEST_F(CatalogTest, AgreesWithAMapUnderRandomPutsForgetsAndErasures) {
  const PartId part = *catalog_.part_id(shape_of({0, 2, 0, 4}));
  std::map<uint64_t, uint64_t> oracle;  // key number -> offset
  std::mt19937 random(5);
  for (int step = 0; step < 60'000; ++step) {
    const uint64_t n = random() % 9'000;
    switch (random() % 5) {
      case 0:
      case 1:
      case 2: {
        const uint64_t offset = uint64_t{random() % 100'000} * 4096;
        catalog_.put(key_of(n), part, slot_, {{1, 0}, offset, 8192});
        oracle[n] = offset;
        break;
      }
      case 3:
        catalog_.forget(key_of(n), 0);
        oracle.erase(n);
        break;
      case 4: {
        const auto known = oracle.find(n);
        catalog_.erase_at(key_of(n), part, slot_, 4096 * 777'777ull);  // another place: no effect
        if (known != oracle.end()) catalog_.erase_at(key_of(n), part, slot_, known->second);
        oracle.erase(n);
        break;
      }
    }
  }
  EXPECT_EQ(catalog_.entries(), oracle.size());
  for (uint64_t n = 0; n < 9'000; ++n) {
    const auto found = catalog_.find(key_of(n), part);
    const auto known = oracle.find(n);
    ASSERT_EQ(found.has_value(), known != oracle.end()) << n;
    if (found) {
      EXPECT_EQ(found->offset, known->second);
    }
  }
}

TEST_F(CatalogTest, EntriesOfACondemnedSegmentAreAbsentAtOnceAndSweptLater) {
  const PartId part = *catalog_.part_id(shape_of({0, 2, 0, 4}));
  const uint32_t other = segments_.slot_of({1, 1});
  segments_.set_present(other, 0, 1 << 20);
  for (uint64_t n = 0; n < 100; ++n) put(n, part);
  for (uint64_t n = 100; n < 150; ++n) catalog_.put(key_of(n), part, other, {{1, 1}, n * 4096, 4096});
  segments_.condemn(slot_, 0);
  EXPECT_FALSE(catalog_.find(key_of(5), part));
  EXPECT_TRUE(catalog_.find(key_of(120), part));
  catalog_.sweep();
  EXPECT_EQ(catalog_.entries(), 50u);
  EXPECT_TRUE(catalog_.find(key_of(120), part));
}

TEST_F(CatalogTest, ASegmentThatOneRootCondemnsIsServedFromTheOther) {
  const PartId part = *catalog_.part_id(shape_of({0, 2, 0, 4}));
  put(1, part);
  segments_.set_present(slot_, 1, 1 << 30);
  segments_.condemn(slot_, 0);
  EXPECT_TRUE(catalog_.find(key_of(1), part));
  EXPECT_EQ(segments_.present_in(slot_), 2u);
}

TEST_F(CatalogTest, TheLongestPrefixStopsAtTheFirstGap) {
  const PartId part = *catalog_.part_id(shape_of({0, 2, 0, 4}));
  std::vector<Key> keys;
  for (uint64_t n = 0; n < 65'536; ++n) keys.push_back(key_of(n));
  const std::vector wants{want_of({0, 2, 0, 4})};
  EXPECT_EQ(catalog_.longest_prefix(keys, wants), 0u);
  for (uint64_t n = 0; n < 65'536; ++n) {
    if (n != 65'535) put(n, part);
  }
  EXPECT_EQ(catalog_.longest_prefix(keys, wants), 65'535u);
  catalog_.forget(key_of(1), 0);
  EXPECT_EQ(catalog_.longest_prefix(keys, wants), 1u);
  EXPECT_EQ(catalog_.longest_prefix({}, wants), 0u);
}

TEST_F(CatalogTest, AChunkIsPresentOnlyWhenAllItsShardsAre) {
  const Part whole{0, 4, 0, 8};
  const PartId left = *catalog_.part_id(shape_of({0, 4, 0, 4}));
  const PartId right = *catalog_.part_id(shape_of({0, 4, 4, 8}));
  const std::vector wants{want_of(whole)};
  const std::vector keys{key_of(0), key_of(1)};
  put(0, left);
  put(1, left);
  EXPECT_EQ(catalog_.longest_prefix(keys, wants), 0u) << "one of two ranks";
  put(0, right);
  EXPECT_EQ(catalog_.longest_prefix(keys, wants), 1u);
  // A pipeline cut covers chunk 1 as well as the tensor cut does.
  put(1, *catalog_.part_id(shape_of({0, 2, 0, 8})));
  put(1, *catalog_.part_id(shape_of({2, 4, 0, 8})));
  EXPECT_EQ(catalog_.longest_prefix(keys, wants), 2u);
  EXPECT_EQ(catalog_.longest_prefix(keys, std::vector{want_of({0, 4, 4, 8})}), 2u)
      << "a part of a cover's part is held";
}

TEST_F(CatalogTest, CutsThatDoNotTileNeverCover) {
  const Part whole{0, 4, 0, 8};
  put(0, *catalog_.part_id(shape_of({0, 4, 0, 5})));
  put(0, *catalog_.part_id(shape_of({0, 3, 5, 8})));
  const std::vector keys{key_of(0)};
  EXPECT_EQ(catalog_.longest_prefix(keys, std::vector{want_of(whole)}), 0u);
  EXPECT_TRUE(catalog_.covers(want_of(whole)).empty());
}

TEST_F(CatalogTest, AWindowGroupNeedsOnlyItsLastChunks) {
  const PartId full = *catalog_.part_id(shape_of({0, 2, 0, 4}, 0));
  const PartId window = *catalog_.part_id(shape_of({0, 2, 0, 4}, 1));
  std::vector<Key> keys;
  for (uint64_t n = 0; n < 10; ++n) {
    keys.push_back(key_of(n));
    put(n, full);
  }
  const std::vector wants{want_of({0, 2, 0, 4}), want_of({0, 2, 0, 4}, 2, 1)};
  EXPECT_EQ(catalog_.longest_prefix(keys, wants), 0u);
  put(5, window);
  EXPECT_EQ(catalog_.longest_prefix(keys, wants), 0u) << "a window of two chunks is not there";
  put(6, window);
  EXPECT_EQ(catalog_.longest_prefix(keys, wants), 7u);
  put(0, window);
  EXPECT_EQ(catalog_.longest_prefix(std::span(keys).first(3), wants), 1u)
      << "a prefix shorter than the window";
}

TEST_F(CatalogTest, AForcedCollisionOf128BitsAnswersOnePlaceAndTheReaderChecksIt) {
  const PartId part = *catalog_.part_id(shape_of({0, 2, 0, 4}));
  Key a = key_of(1);
  Key b = a;
  b.bytes[31] ^= 1;  // beyond the 128 bits that the catalog keeps
  put(1, part);
  const auto found = catalog_.find(b, part);
  ASSERT_TRUE(found) << "the catalog cannot tell them apart; the extent's header names the full key";
  EXPECT_EQ(found->offset, 4096u);
}

}  // namespace
}  // namespace tokendepot
