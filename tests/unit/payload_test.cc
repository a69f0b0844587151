#include "workload/payload.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

namespace tokendepot {
namespace {

std::vector<std::byte> extent_of(uint64_t bytes, const PayloadId& id) {
  std::vector<std::byte> memory(bytes);
  fill_tile(memory, id.process, id.tile_at);
  stamp_payload(memory, id);
  return memory;
}

TEST(Payload, NoTwoBlocksOf512BytesAreEqualHoweverOftenTheSameMemoryIsStored) {
  std::set<std::string> seen;
  size_t blocks = 0;
  for (uint32_t process = 0; process < 3; ++process) {
    for (uint32_t serial = 0; serial < 50; ++serial) {
      const auto extent = extent_of(32 << 10, {process, serial, 4096});
      for (size_t at = 0; at < extent.size(); at += 512, ++blocks)
        seen.emplace(reinterpret_cast<const char*>(extent.data()) + at, 512);
    }
  }
  EXPECT_EQ(seen.size(), blocks);
}

TEST(Payload, AsItWasStoredItDiffersNowhere) {
  for (const uint64_t bytes : {4096u, 65536u, 36864u}) {
    const PayloadId id{7, 9, 8192};
    EXPECT_EQ(first_difference(extent_of(bytes, id), id), std::nullopt) << bytes;
  }
}

TEST(Payload, EveryFlippedBitIsSeenAtItsPlace) {
  const PayloadId id{1, 2, 0};
  auto extent = extent_of(8192, id);
  for (size_t at = 0; at < extent.size(); at += 97) {
    extent[at] ^= std::byte{0x10};
    EXPECT_EQ(first_difference(extent, id), at);
    extent[at] ^= std::byte{0x10};
  }
}

TEST(Payload, AnotherStoreFromTheSameMemoryIsNotTaken) {
  const auto extent = extent_of(4096, {1, 2, 0});
  EXPECT_TRUE(first_difference(extent, {1, 3, 0}));
  EXPECT_TRUE(first_difference(extent, {2, 2, 0}));
}

}  // namespace
}  // namespace tokendepot
