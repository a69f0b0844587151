#include "device/host_kernels.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "device/stream_copy.h"
#include "format/digest.h"
#include "paged_memory.h"

namespace tokendepot::paged_test {
namespace {

GroupShape canonical(Part part, uint32_t tokens, uint32_t block_tokens, uint16_t planes, uint32_t row_bytes) {
  return {.kind = LayoutKind::canonical,
          .part = part,
          .tokens = tokens,
          .block_tokens = block_tokens,
          .planes = planes,
          .row_bytes = row_bytes};
}

GroupShape opaque(Part part, uint32_t blocks, uint32_t block_tokens, uint32_t page_bytes) {
  return {.kind = LayoutKind::opaque,
          .part = part,
          .tokens = blocks * block_tokens,
          .block_tokens = block_tokens,
          .page_bytes = page_bytes};
}

ScatterOutcome scatter(const PagedCache& cache, const ExtentHeader& header,
                       std::span<const std::byte> payload, std::span<const int32_t> blocks,
                       uint32_t first_shard, uint32_t shards) {
  const uint64_t stride = header.shape().shard_stride();
  ScatterWork work;
  work.cache = &cache;
  work.header = &header;
  work.payload = payload.subspan(first_shard * stride, shards * stride);
  work.first_shard = first_shard;
  work.shards = shards;
  work.blocks = blocks;
  return verify_and_scatter(work);
}

/// Scatters a run of shards of the extent and compares every byte of the cache's memory with the naive
/// reference.
void expect_scatter(PagedMemory& memory, const GroupShape& extent, std::span<const int32_t> blocks,
                    uint32_t first_shard, uint32_t shards) {
  const auto payload = reference_payload(extent);
  const ExtentHeader header = header_of(extent, payload);
  const auto before = memory.bytes;
  ASSERT_EQ(scatter(memory.cache, header, payload, blocks, first_shard, shards), ScatterOutcome::ok);
  const auto after = memory.bytes;

  GroupShape run = extent;
  if (extent.kind == LayoutKind::canonical) {
    run.part.head_begin = uint16_t(extent.part.head_begin + first_shard);
    run.part.head_end = uint16_t(run.part.head_begin + shards);
  } else {
    run.part.layer_begin = uint16_t(extent.part.layer_begin + first_shard);
    run.part.layer_end = uint16_t(run.part.layer_begin + shards);
  }
  std::copy(before.begin(), before.end(), memory.bytes.begin());
  reference_scatter(run, memory.cache, blocks);
  ASSERT_TRUE(memory.bytes == after);
}

/// Fills the blocks, gathers them, and compares payload, padding, digests and the cache's memory.
void expect_gather(PagedMemory& memory, std::span<const int32_t> blocks) {
  const GroupShape& shape = memory.cache.shape;
  reference_scatter(shape, memory.cache, blocks);
  const auto before = memory.bytes;
  std::vector<std::byte> payload(shape.payload_bytes(), std::byte{0xEE});
  std::vector<uint64_t> digests(shape.shards());
  GatherWork work;
  work.cache = &memory.cache;
  work.blocks = blocks;
  work.payload = payload;
  work.digests = digests;
  gather_and_digest(work);
  const auto expected = reference_payload(shape);
  ASSERT_TRUE(payload == expected);
  ASSERT_EQ(digests, header_of(shape, expected).shard_digests);
  ASSERT_TRUE(memory.bytes == before);
}

struct NamedOrder {
  const char* name;
  const char* axes;
};
// The orders that engines use, outermost axis first.
constexpr NamedOrder kOrders[] = {
    {"nhd", "LPBTH"},
    {"hnd", "LPBHT"},
    {"pair_first", "LPBTH"},
    {"block_first", "LBPTH"},
    {"block_first_hnd", "LBPHT"},
    {"packed_rows", "LBTHP"},
    {"all_layers_in_block", "BLPHT"},
    {"token_first", "TBLPH"},
};

TEST(HostKernels, EveryEngineLayoutMakesTheRoundTrip) {
  std::mt19937 random(1);
  for (const auto& [name, axes] : kOrders) {
    for (const uint32_t row_bytes : {256u, 64u, 576u}) {
      SCOPED_TRACE(std::string(name) + " rows of " + std::to_string(row_bytes));
      const auto shape = canonical({2, 5, 4, 7}, 64, 16, 2, row_bytes);
      const auto blocks = pick_blocks(4, 9, random);
      auto memory = make_canonical(shape, 9, axes, 0, random);
      expect_gather(memory, blocks);
      auto fresh = make_canonical(shape, 9, axes, 0, random);
      expect_scatter(fresh, shape, blocks, 0, shape.shards());
    }
  }
}

TEST(HostKernels, OnePlaneOfLatentRowsMakesTheRoundTrip) {
  std::mt19937 random(2);
  const auto shape = canonical({0, 4, 0, 1}, 128, 64, 1, 1152);
  const auto blocks = pick_blocks(2, 5, random);
  auto memory = make_canonical(shape, 5, "LBPHT", 0, random);
  expect_gather(memory, blocks);
  auto fresh = make_canonical(shape, 5, "LBPHT", 0, random);
  expect_scatter(fresh, shape, blocks, 0, 1);
}

TEST(HostKernels, RandomShapesAndStridesMatchTheNaiveCopy) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const uint32_t block_tokens = 1u << random() % 5;
    const uint32_t blocks_per_extent = 1 + random() % 6;
    const uint32_t block_count = blocks_per_extent + random() % 5;
    const Part part{uint16_t(random() % 3), uint16_t(3 + random() % 3), uint16_t(random() % 4),
                    uint16_t(4 + random() % 3)};
    const uint32_t row_choices[] = {1 + uint32_t(random() % 300), 64 * (1 + uint32_t(random() % 6)), 4096,
                                    5000};
    const uint32_t row_bytes = row_choices[random() % (seed % 10 == 0 ? 4 : 2)];
    const auto shape = canonical(part, blocks_per_extent * block_tokens, block_tokens,
                                 uint16_t(1 + random() % 2), row_bytes);
    std::string axes = "LPBHT";
    std::shuffle(axes.begin(), axes.end(), random);
    const uint32_t gaps[] = {0, 5, 200};
    const uint32_t max_gap = gaps[random() % 3];

    auto blocks = pick_blocks(blocks_per_extent, block_count, random);
    auto memory = make_canonical(shape, block_count, axes, max_gap, random);
    expect_gather(memory, blocks);

    auto fresh = make_canonical(shape, block_count, axes, max_gap, random);
    for (int32_t& id : blocks) {
      if (random() % 4 == 0) id = kSkipBlock;
    }
    const uint32_t first = random() % shape.shards();
    expect_scatter(fresh, shape, blocks, first, 1 + random() % (shape.shards() - first));
  }
}

TEST(HostKernels, OpaquePagesOfOneAndTwoPiecesMakeTheRoundTrip) {
  std::mt19937 random(3);
  for (const std::vector<uint32_t>& pieces :
       {std::vector<uint32_t>{8192}, {4096, 4096}, {1000}, {700, 1313}, {1, 4096}}) {
    SCOPED_TRACE(pieces.front());
    uint32_t page_bytes = 0;
    for (const uint32_t piece : pieces) page_bytes += piece;
    const auto shape = opaque({3, 7, 1, 2}, 5, 16, page_bytes);
    auto blocks = pick_blocks(5, 11, random);
    auto memory = make_opaque(shape, 11, pieces, 24, random);
    expect_gather(memory, blocks);
    auto fresh = make_opaque(shape, 11, pieces, 24, random);
    blocks[2] = kSkipBlock;
    expect_scatter(fresh, shape, blocks, 0, shape.shards());
    auto again = make_opaque(shape, 11, pieces, 24, random);
    expect_scatter(again, shape, blocks, 1, 2);
  }
}

TEST(HostKernels, AnOpaqueReaderTakesOnlyItsLayers) {
  std::mt19937 random(4);
  const auto extent = opaque({0, 8, 0, 1}, 3, 16, 2048);
  const auto mine = opaque({5, 12, 0, 1}, 3, 16, 2048);
  const std::vector<uint32_t> pieces{2048};
  auto memory = make_opaque(mine, 6, pieces, 0, random);
  expect_scatter(memory, extent, pick_blocks(3, 6, random), 0, extent.shards());
}

TEST(HostKernels, WideExtentsAreReadByNarrowRanks) {
  std::mt19937 random(5);
  const auto extent = canonical({0, 3, 0, 8}, 48, 16, 2, 128);
  for (uint16_t rank = 0; rank < 4; ++rank) {
    SCOPED_TRACE(rank);
    const auto mine = canonical({0, 3, uint16_t(2 * rank), uint16_t(2 * rank + 2)}, 48, 16, 2, 128);
    const auto blocks = pick_blocks(3, 7, random);
    auto run_only = make_canonical(mine, 7, "LPBTH", 0, random);
    expect_scatter(run_only, extent, blocks, 2u * rank, 2);
    auto all_shards = make_canonical(mine, 7, "LPBTH", 0, random);
    expect_scatter(all_shards, extent, blocks, 0, 8);
  }
}

TEST(HostKernels, NarrowExtentsTogetherFillAWideReader) {
  std::mt19937 random(6);
  const auto mine = canonical({0, 3, 0, 4}, 48, 16, 2, 128);
  const auto blocks = pick_blocks(3, 7, random);
  auto memory = make_canonical(mine, 7, "LPBHT", 0, random);
  const auto before = memory.bytes;
  for (uint16_t rank = 0; rank < 2; ++rank) {
    const auto extent = canonical({0, 3, uint16_t(2 * rank), uint16_t(2 * rank + 2)}, 48, 16, 2, 128);
    const auto payload = reference_payload(extent);
    ASSERT_EQ(scatter(memory.cache, header_of(extent, payload), payload, blocks, 0, 2), ScatterOutcome::ok);
  }
  const auto after = memory.bytes;
  std::copy(before.begin(), before.end(), memory.bytes.begin());
  reference_scatter(mine, memory.cache, blocks);
  EXPECT_TRUE(memory.bytes == after);
}

TEST(HostKernels, PipelineStagesTakeTheirLayersFromAnyExtent) {
  std::mt19937 random(7);
  const Part extents[] = {{0, 6, 0, 2}, {0, 3, 0, 2}, {3, 6, 0, 2}, {2, 4, 1, 2}};
  const Part readers[] = {{0, 6, 0, 2}, {0, 2, 0, 2}, {2, 6, 0, 1}, {3, 4, 1, 2}};
  for (const Part& from : extents) {
    for (const Part& to : readers) {
      const auto extent = canonical(from, 32, 16, 2, 64);
      auto memory = make_canonical(canonical(to, 32, 16, 2, 64), 5, "LBPTH", 0, random);
      expect_scatter(memory, extent, pick_blocks(2, 5, random), 0, extent.shards());
    }
  }
}

TEST(HostKernels, AShardOutsideTheReadersPartIsVerifiedAndNotWritten) {
  std::mt19937 random(8);
  const auto extent = canonical({0, 2, 0, 2}, 32, 16, 2, 64);
  auto memory = make_canonical(canonical({0, 2, 6, 8}, 32, 16, 2, 64), 5, "LPBTH", 0, random);
  const auto blocks = pick_blocks(2, 5, random);
  expect_scatter(memory, extent, blocks, 0, 2);
  auto payload = reference_payload(extent);
  const auto header = header_of(extent, payload);
  payload[17] ^= std::byte{1};
  EXPECT_EQ(scatter(memory.cache, header, payload, blocks, 0, 2), ScatterOutcome::corrupt);
}

TEST(HostKernels, ReadersAndWritersMayHaveDifferentBlockSizes) {
  std::mt19937 random(9);
  for (const uint32_t writer : {8u, 16u, 32u, 64u}) {
    for (const uint32_t reader : {1u, 4u, 16u, 64u}) {
      SCOPED_TRACE(std::to_string(writer) + " to " + std::to_string(reader));
      const auto extent = canonical({0, 2, 0, 2}, 64, writer, 2, 96);
      auto memory = make_canonical(canonical({0, 2, 0, 2}, 64, reader, 2, 96), 70, "LPBTH", 3, random);
      auto blocks = pick_blocks(64 / reader, 70, random);
      if (blocks.size() > 1) blocks[1] = kSkipBlock;
      expect_scatter(memory, extent, blocks, 0, 2);
    }
  }
}

TEST(HostKernels, AFlippedBitAnywhereWritesNothing) {
  std::mt19937 random(10);
  const auto shape = canonical({0, 3, 0, 3}, 32, 16, 2, 100);  // 19,200 bytes of a shard's 20,480 are used
  ASSERT_LT(shape.shard_bytes(), shape.shard_stride());
  auto payload = reference_payload(shape);
  const auto header = header_of(shape, payload);
  auto memory = make_canonical(shape, 6, "LPBTH", 0, random);
  const auto before = memory.bytes;
  const auto blocks = pick_blocks(2, 6, random);
  std::vector<uint64_t> places{0, shape.shard_bytes() - 1, shape.shard_bytes(), shape.shard_stride() - 1,
                               shape.payload_bytes() - 1};
  for (int i = 0; i < 400; ++i) places.push_back(random() % payload.size());
  for (const uint64_t place : places) {
    const std::byte flip{uint8_t(1u << random() % 8)};
    payload[place] ^= flip;
    ASSERT_EQ(scatter(memory.cache, header, payload, blocks, 0, 3), ScatterOutcome::corrupt) << place;
    ASSERT_TRUE(memory.bytes == before) << place;
    payload[place] ^= flip;
  }
  EXPECT_EQ(scatter(memory.cache, header, payload, blocks, 0, 3), ScatterOutcome::ok);
}

TEST(HostKernels, PageDigestsMadeByWhoeverReadThePayloadDecideInItsPlace) {
  std::mt19937 random(13);
  const auto shape = canonical({0, 3, 0, 3}, 32, 16, 2, 100);
  const auto payload = reference_payload(shape);
  const auto header = header_of(shape, payload);
  auto memory = make_canonical(shape, 6, "LPBTH", 0, random);
  const auto before = memory.bytes;
  const auto blocks = pick_blocks(2, 6, random);
  const uint64_t stride = shape.shard_stride();
  const auto run = std::span(payload).subspan(stride, 2 * stride);
  std::vector<uint64_t> digests(run.size() / kPageBytes);
  digest_pages(run, digests);
  ScatterWork work;
  work.cache = &memory.cache;
  work.header = &header;
  work.payload = run;
  work.first_shard = 1;
  work.shards = 2;
  work.blocks = blocks;
  work.page_digests = digests;
  for (uint64_t& digest : digests) {
    digest ^= 1;
    ASSERT_EQ(verify_and_scatter(work), ScatterOutcome::corrupt);
    digest ^= 1;
  }
  ASSERT_TRUE(memory.bytes == before);
  EXPECT_EQ(verify_and_scatter(work), ScatterOutcome::ok);
  EXPECT_FALSE(memory.bytes == before);
}

TEST(HostKernels, DamageOutsideTheRunOfShardsDoesNotMatter) {
  std::mt19937 random(11);
  const auto shape = canonical({0, 3, 0, 3}, 32, 16, 2, 100);
  auto payload = reference_payload(shape);
  const auto header = header_of(shape, payload);
  payload[0] ^= std::byte{1};
  auto memory = make_canonical(shape, 6, "LPBTH", 0, random);
  const auto blocks = pick_blocks(2, 6, random);
  EXPECT_EQ(scatter(memory.cache, header, payload, blocks, 1, 2), ScatterOutcome::ok);
  EXPECT_EQ(scatter(memory.cache, header, payload, blocks, 0, 2), ScatterOutcome::corrupt);
}

TEST(HostKernels, SwappedShardsAreCorrupt) {
  std::mt19937 random(12);
  const auto shape = canonical({0, 3, 0, 2}, 32, 16, 2, 128);
  auto payload = reference_payload(shape);
  const auto header = header_of(shape, payload);
  std::rotate(payload.begin(), payload.begin() + int64_t(shape.shard_stride()), payload.end());
  auto memory = make_canonical(shape, 6, "LPBTH", 0, random);
  EXPECT_EQ(scatter(memory.cache, header, payload, pick_blocks(2, 6, random), 0, 2), ScatterOutcome::corrupt);
}

TEST(HostKernels, AllBlocksSkippedWritesNothing) {
  std::mt19937 random(13);
  const auto shape = canonical({0, 2, 0, 2}, 32, 16, 2, 64);
  auto memory = make_canonical(shape, 4, "LPBHT", 0, random);
  const std::vector<int32_t> blocks{kSkipBlock, kSkipBlock};
  expect_scatter(memory, shape, blocks, 0, 2);
}

// Byte offsets of blocks on both sides of 2^31 and 2^32, in one call, with all layers of a model inside the
// stride.
TEST(HostKernels, BlockStridesBeyondFourGibibytesAreExact) {
  constexpr int64_t kBlockStride = 1'002'240;
  constexpr uint32_t kBlocks = 4'400, kLayers = 80, kBlockTokens = 8, kRowBytes = 783;
  static_assert(uint64_t{kLayers} * 2 * kBlockTokens * kRowBytes == kBlockStride);
  static_assert(2142 * kBlockStride < (int64_t{1} << 31) && 2143 * kBlockStride > (int64_t{1} << 31));
  static_assert(4285 * kBlockStride < (int64_t{1} << 32) && 4286 * kBlockStride > (int64_t{1} << 32));
  const std::vector<int32_t> blocks{4286, 0, 2143, 4285, 2142};
  const auto shape = canonical({0, kLayers, 0, 1}, 5 * kBlockTokens, kBlockTokens, 2, kRowBytes);

  const uint64_t size = kBlocks * uint64_t{kBlockStride};
  void* memory =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  PagedCache cache{.shape = shape, .block_count = kBlocks, .layers = {}};
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    std::vector<Plane> planes;
    for (uint32_t plane = 0; plane < 2; ++plane) {
      planes.push_back(
          {.base = static_cast<std::byte*>(memory) + (uint64_t{layer} * 2 + plane) * kBlockTokens * kRowBytes,
           .block_stride = kBlockStride,
           .head_stride = 0,
           .token_stride = kRowBytes});
    }
    cache.layers.push_back(std::move(planes));
  }

  const auto payload = reference_payload(shape);
  const auto header = header_of(shape, payload);
  ASSERT_EQ(scatter(cache, header, payload, blocks, 0, 1), ScatterOutcome::ok);
  uint64_t wrong = 0;
  for_each_cell(shape, [&](const Cell& cell, uint64_t bytes, uint64_t) {
    for (uint64_t i = 0; i < bytes; ++i) wrong += *find(cache, blocks, cell, i) != content(cell, i);
  });
  EXPECT_EQ(wrong, 0u);

  std::vector<std::byte> gathered(shape.payload_bytes());
  std::vector<uint64_t> digests(1);
  GatherWork work;
  work.cache = &cache;
  work.blocks = blocks;
  work.payload = gathered;
  work.digests = digests;
  gather_and_digest(work);
  EXPECT_TRUE(gathered == payload);
  EXPECT_EQ(digests, header.shard_digests);
  munmap(memory, size);
}

TEST(HostKernels, NegativeStridesAreFollowed) {
  std::mt19937 random(14);
  const auto shape = canonical({0, 1, 0, 2}, 32, 16, 1, 64);
  auto memory = make_canonical(shape, 6, "LPBHT", 0, random);
  Plane& plane = memory.cache.layers[0][0];
  plane.base += 5 * plane.block_stride + plane.head_stride;
  plane.block_stride = -plane.block_stride;
  plane.head_stride = -plane.head_stride;
  const auto blocks = pick_blocks(2, 6, random);
  expect_gather(memory, blocks);
  expect_scatter(memory, shape, blocks, 0, 2);
}

TEST(HostKernelsDeathTest, AWrongBlockIdOrShapeIsABug) {
  std::mt19937 random(15);
  const auto shape = canonical({0, 2, 0, 2}, 32, 16, 2, 64);
  auto memory = make_canonical(shape, 4, "LPBHT", 0, random);
  const auto payload = reference_payload(shape);
  const auto header = header_of(shape, payload);
  const auto run = [&](const ExtentHeader& h, std::vector<int32_t> blocks) {
    scatter(memory.cache, h, payload, blocks, 0, 2);
  };
  EXPECT_DEATH(run(header, {0, 4}), "check failed");
  EXPECT_DEATH(run(header, {0, -2}), "check failed");
  EXPECT_DEATH(run(header, {0}), "check failed");
  auto other_rows = header;
  other_rows.row_bytes = 63;  // the same payload size
  EXPECT_DEATH(run(other_rows, {0, 1}), "check failed");
  auto other_kind = header;
  other_kind.kind = LayoutKind::opaque;
  EXPECT_DEATH(run(other_kind, {0, 1}), "check failed");
}

void expect_exact_copies(CopyRows copy_rows) {
  std::mt19937 random(16);
  std::vector<std::byte> from(8192);
  for (std::byte& byte : from) byte = std::byte(random());
  std::vector<std::byte> to(from.size());
  for (int i = 0; i < 20'000; ++i) {
    const uint64_t bytes = random() % 700, rows = random() % 5;
    const int64_t from_stride = int64_t(bytes + random() % 100), to_stride = int64_t(bytes + random() % 100);
    const int64_t from_at = random() % 128, to_at = random() % 128;
    std::fill(to.begin(), to.end(), std::byte{0xA5});
    auto expected = to;
    for (int64_t row = 0; row < int64_t(rows); ++row) {
      std::copy_n(from.begin() + from_at + row * from_stride, bytes,
                  expected.begin() + to_at + row * to_stride);
    }
    copy_rows({.to = to.data() + to_at,
               .to_stride = to_stride,
               .from = from.data() + from_at,
               .from_stride = from_stride,
               .row_bytes = bytes,
               .rows = rows});
    stream_fence();
    ASSERT_TRUE(to == expected) << bytes << " bytes to " << to_at;
  }
}

TEST(RowCopies, EveryCopyOfThisCpuIsExactAtEveryAlignment) {
  expect_exact_copies(copy_rows_cached);
  ASSERT_NE(stream_copies().front(), nullptr);
  for (const CopyRows copy_rows : stream_copies()) {
    if (copy_rows != nullptr) expect_exact_copies(copy_rows);
  }
}

}  // namespace
}  // namespace tokendepot::paged_test
