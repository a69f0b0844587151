// The arithmetic of the CUDA kernels, without a GPU: exact division, and where a vector of an extent lies in
// a cache.
#include "device/cuda/locate.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace tokendepot::cuda {
namespace {

TEST(Divisor, IsExactForAllNumbersBelowTwoToThe31) {
  constexpr uint32_t kEnd = 1u << 31;
  std::mt19937 random(1);
  std::vector<uint32_t> divisors{kEnd, kEnd - 1, kEnd / 2, kEnd / 2 + 1};
  for (uint32_t by = 1; by <= 2048; ++by) divisors.push_back(by);
  for (int i = 0; i < 2000; ++i) divisors.push_back((1 + (random() >> 1) % (kEnd - 1)) >> random() % 30);
  for (const uint32_t by : divisors) {
    if (by == 0) continue;
    const Divisor divisor(by);
    const auto check = [&](uint64_t number) {
      if (number >= kEnd) return;
      const auto n = static_cast<uint32_t>(number);
      ASSERT_EQ(divisor.quotient(n), n / by) << n << " / " << by;
    };
    for (const uint64_t number : {uint64_t{0}, uint64_t{1}, uint64_t{kEnd} - 1}) check(number);
    for (int i = 0; i < 50; ++i) {
      const uint64_t multiple = uint64_t{by} * (random() % (kEnd / by + 1));
      check(multiple);
      check(multiple + 1);
      if (multiple > 0) check(multiple - 1);
      check(random() >> 1);
    }
  }
}

/// A random fit, and the same described with plain division.
struct Case {
  explicit Case(std::mt19937& random) {
    const auto up_to = [&](uint32_t most) { return static_cast<uint32_t>(1 + random() % most); };
    const uint32_t cache_layers = up_to(5), cache_heads = up_to(6);
    per_layer = up_to(3);
    fit.opaque = random() % 3 == 0;
    fit.planes_per_layer = Divisor(per_layer);
    block_tokens = up_to(48);
    blocks_of_extent = up_to(12);
    tokens = block_tokens * blocks_of_extent;
    row_bytes = up_to(300);
    fit.block_tokens = Divisor(block_tokens);
    fit.tokens = Divisor(tokens);
    fit.row_bytes = Divisor(row_bytes);
    fit.cache_layer_begin = static_cast<uint32_t>(random() % 3);
    fit.cache_layer_end = fit.cache_layer_begin + cache_layers;
    fit.cache_head_begin = static_cast<uint32_t>(random() % 3);
    fit.cache_head_end = fit.cache_head_begin + cache_heads;
    // The extent may begin before the cache's part and end behind it.
    fit.layer_begin = fit.opaque ? fit.cache_layer_begin : static_cast<uint32_t>(random() % 4);
    layers = fit.opaque ? cache_layers : up_to(6);
    fit.head_begin = static_cast<uint32_t>(random() % 4);
    fit.first_shard =
        fit.opaque ? static_cast<uint32_t>(random() % cache_layers) : static_cast<uint32_t>(random() % 3);
    uint32_t page = 0;
    for (uint32_t layer = 0; layer < cache_layers; ++layer) {
      uint32_t offset = 0;
      for (uint32_t plane = 0; plane < per_layer; ++plane) {
        const uint32_t piece = layer == 0 ? up_to(500) : planes[plane].piece_bytes;
        planes.push_back({memory.data() + planes.size() * 16, static_cast<int64_t>(random() % 9000),
                          static_cast<int64_t>(random() % 700), static_cast<int64_t>(random() % 400), piece,
                          offset});
        offset += piece;
      }
      page = offset;
    }
    page_bytes = page;
    fit.page_bytes = Divisor(page_bytes);
    fit.planes = planes.data();
    for (uint32_t i = 0; i < blocks_of_extent; ++i)
      ids.push_back(random() % 4 == 0 ? -1 : static_cast<int32_t>(random() % 1000));
    fit.blocks = random() % 2 == 0 ? ids.data() : nullptr;
    std::copy(ids.begin(), ids.end(), fit.few_blocks);
  }
  uint32_t shard_bytes() const {
    return fit.opaque ? page_bytes * blocks_of_extent : row_bytes * tokens * per_layer * layers;
  }
  uint8_t* plain(uint32_t shard, uint32_t offset) const {
    if (fit.opaque) {
      const int32_t block = ids[offset / page_bytes];
      const uint32_t layer = fit.first_shard + shard;
      for (uint32_t i = 0; i < per_layer; ++i) {
        const DevicePlane& piece = planes[layer * per_layer + i];
        const uint32_t byte = offset % page_bytes;
        if (byte < piece.piece_offset || byte >= piece.piece_offset + piece.piece_bytes) continue;
        return block < 0 ? nullptr : piece.base + block * piece.block_stride + (byte - piece.piece_offset);
      }
      return nullptr;
    }
    const uint32_t byte = offset % row_bytes, token = offset / row_bytes % tokens;
    const uint32_t plane = offset / row_bytes / tokens % per_layer;
    const uint32_t layer = fit.layer_begin + offset / row_bytes / tokens / per_layer;
    const uint32_t head = fit.head_begin + fit.first_shard + shard;
    if (layer < fit.cache_layer_begin || layer >= fit.cache_layer_end) return nullptr;
    if (head < fit.cache_head_begin || head >= fit.cache_head_end) return nullptr;
    const int32_t block = ids[token / block_tokens];
    if (block < 0) return nullptr;
    const DevicePlane& p = planes[(layer - fit.cache_layer_begin) * per_layer + plane];
    return p.base + block * p.block_stride + (head - fit.cache_head_begin) * p.head_stride +
           token % block_tokens * p.token_stride + byte;
  }

  Fit fit{};
  uint32_t per_layer, block_tokens, blocks_of_extent, tokens, row_bytes, layers, page_bytes;
  std::vector<DevicePlane> planes;
  std::vector<int32_t> ids;
  std::vector<uint8_t> memory = std::vector<uint8_t>(16 << 20);
};

TEST(Locate, FindsEveryByteWherePlainDivisionFindsIt) {
  std::mt19937 random(2);
  for (int round = 0; round < 60; ++round) {
    const Case one(random);
    const uint32_t shards = one.fit.opaque ? one.layers - one.fit.first_shard : 4;
    for (int i = 0; i < 3000; ++i) {
      const uint32_t shard = static_cast<uint32_t>(random() % shards);
      const auto offset = static_cast<uint32_t>(random() % one.shard_bytes());
      const Target found = locate(one.fit, shard, offset);
      ASSERT_EQ(found.at, one.plain(shard, offset)) << "round " << round << " offset " << offset;
      ASSERT_GT(found.run, 0u);
      if (found.at == nullptr || offset + found.run > one.shard_bytes()) continue;
      ASSERT_EQ(found.at + found.run - 1, one.plain(shard, offset + found.run - 1)) << "the end of the run";
    }
  }
}

}  // namespace
}  // namespace tokendepot::cuda
