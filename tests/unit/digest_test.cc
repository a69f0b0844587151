#include "format/digest.h"

#include <gtest/gtest.h>

#include <vector>

#include "damage.h"
#include "tokendepot/layout.h"

namespace tokendepot {
namespace {

std::vector<std::byte> pages_of(size_t pages, uint64_t seed) {
  damage::Random random(seed);
  std::vector<std::byte> bytes(pages * kPageBytes);
  for (std::byte& byte : bytes) byte = random.any<std::byte>();
  return bytes;
}

// i mod 251, then a page of zeros.
std::vector<std::byte> pattern() {
  std::vector<std::byte> bytes(2 * kPageBytes);
  for (size_t i = 0; i < kPageBytes; ++i) bytes[i] = static_cast<std::byte>(i % 251);
  return bytes;
}

// The format's numbers, for other implementations to compare with.
TEST(DigestTest, known_bytes_have_the_documented_digests) {
  const std::vector<std::byte> bytes = pattern();
  const std::span<const std::byte> all = bytes;
  EXPECT_EQ(xxh3({}), 0x2d06800538d394c2u);
  EXPECT_EQ(xxh3(all.first(kPageBytes)), 0x7135ffa504f1bc71u);
  EXPECT_EQ(xxh3(all.last(kPageBytes)), 0x93d76fe148c689bau);
  EXPECT_EQ(shard_digest(all.first(kPageBytes)), 0x6326d1a712c30996u);
  EXPECT_EQ(shard_digest(all), 0xb849cd3561adc422u);
}

TEST(DigestTest, a_shard_of_any_size_has_the_digest_of_its_page_digests) {
  ShardDigest in_pieces;
  for (const size_t pages : {1, 2, 63, 64, 65, 128, 300}) {
    const std::vector<std::byte> shard = pages_of(pages, pages);
    std::vector<uint64_t> digests(pages);
    digest_pages(shard, digests);
    EXPECT_EQ(digests.back(), xxh3(std::span(shard).last(kPageBytes)));
    EXPECT_EQ(shard_digest(shard), shard_digest_of_pages(digests)) << pages;
    for (size_t at = 0; at < pages; at += 7)
      in_pieces.add(std::span(shard).subspan(at * kPageBytes, std::min<size_t>(7, pages - at) * kPageBytes));
    EXPECT_EQ(in_pieces.take(), shard_digest(shard)) << pages;
  }
}

TEST(DigestTest, a_changed_byte_and_a_pair_of_swapped_pages_change_the_digest) {
  const std::vector<std::byte> good = pages_of(70, 1);
  std::vector<std::byte> bad = good;
  for (size_t at = 0; at < bad.size(); at += 1009) {
    bad[at] ^= std::byte{1};
    EXPECT_NE(shard_digest(bad), shard_digest(good)) << at;
    bad[at] ^= std::byte{1};
  }
  std::swap_ranges(bad.begin(), bad.begin() + kPageBytes, bad.begin() + 5 * kPageBytes);
  EXPECT_NE(shard_digest(bad), shard_digest(good));
}

TEST(DigestDeathTest, a_shard_that_is_not_whole_pages_is_a_bug) {
  const std::vector<std::byte> bytes(kPageBytes + 1);
  EXPECT_DEATH(shard_digest(bytes), "check failed");
}

}  // namespace
}  // namespace tokendepot
