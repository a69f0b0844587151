#include "tokendepot/layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>

namespace tokendepot {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int64_t kRow = 128;
constexpr int64_t kHeads = 4;
constexpr int64_t kBlockTokens = 16;
constexpr int64_t kLayers = 2;
constexpr uint32_t kBlocks = 100;

// Never read: only the address counts.
std::byte memory[64];

PagedCache cache_with(const Plane& key, const Plane& value) {
  PagedCache cache;
  cache.shape.part = {.layer_begin = 0, .layer_end = kLayers, .head_begin = 0, .head_end = kHeads};
  cache.shape.tokens = 256;
  cache.shape.block_tokens = kBlockTokens;
  cache.shape.planes = 2;
  cache.shape.row_bytes = kRow;
  cache.block_count = kBlocks;
  cache.layers.assign(kLayers, {key, value});
  return cache;
}

Plane strided(int64_t block, int64_t head, int64_t token) {
  Plane plane;
  plane.base = memory;
  plane.block_stride = block;
  plane.head_stride = head;
  plane.token_stride = token;
  return plane;
}

PagedCache valid_cache() {
  const Plane plane = strided(kBlockTokens * kHeads * kRow, kRow, kHeads * kRow);
  return cache_with(plane, plane);
}

PagedCache valid_opaque() {
  PagedCache cache = valid_cache();
  cache.shape.kind = LayoutKind::opaque;
  cache.shape.part.head_end = 1;
  cache.shape.row_bytes = 0;
  cache.shape.page_bytes = 3000;
  Plane first = strided(4096, 0, 0);
  first.piece_bytes = 2000;
  Plane second = strided(-1000, 0, 0);
  second.piece_bytes = 1000;
  cache.layers.assign(kLayers, {first, second});
  return cache;
}

void expect_refused(const PagedCache& cache, const std::string& field, const std::string& value) {
  const Status status = validate(cache);
  ASSERT_FALSE(status.has_value()) << field;
  EXPECT_EQ(status.error().kind, ErrorKind::invalid_argument);
  EXPECT_THAT(status.error().message, AllOf(HasSubstr(field), HasSubstr(value)));
}

void expect_refused(const std::function<void(PagedCache&)>& change, const std::string& field,
                    const std::string& value) {
  PagedCache cache = valid_cache();
  change(cache);
  expect_refused(cache, field, value);
}

TEST(PagedCacheTest, the_layouts_that_engines_use_are_accepted) {
  const int64_t page = kBlockTokens * kHeads * kRow;
  const Plane token_major = strided(page, kRow, kHeads * kRow);
  const Plane head_major = strided(page, kBlockTokens * kRow, kRow);
  const Plane pairs = strided(2 * page, kRow, kHeads * kRow);  // K and V of a block side by side
  const Plane all_layers =
      strided(2 * page * kLayers, kRow, kHeads * kRow);                      // all layers of a block together
  const Plane interleaved = strided(2 * page, 2 * kRow, 2 * kHeads * kRow);  // K and V of a head side by side
  const Plane padded = strided(page + 4096, kRow + 16, kHeads * (kRow + 16));
  const Plane backwards = strided(-page, kRow, kHeads * kRow);
  for (const Plane& plane : {token_major, head_major, pairs, all_layers, interleaved, padded, backwards}) {
    const Status status = validate(cache_with(plane, plane));
    EXPECT_TRUE(status.has_value()) << status.error().message;
  }
}

TEST(PagedCacheTest, one_plane_of_one_head_is_accepted_whatever_its_head_stride) {
  PagedCache cache = valid_cache();
  cache.shape.planes = 1;
  cache.shape.part.head_end = 1;
  cache.layers.assign(kLayers, {strided(kBlockTokens * kRow, 0, kRow)});
  EXPECT_TRUE(validate(cache).has_value());
}

TEST(PagedCacheTest, opaque_pages_in_pieces_are_accepted) {
  const Status status = validate(valid_opaque());
  EXPECT_TRUE(status.has_value()) << status.error().message;
}

TEST(PagedCacheTest, a_field_out_of_range_is_named_with_its_value) {
  expect_refused([](PagedCache& c) { c.shape.kind = static_cast<LayoutKind>(9); }, "kind", "9");
  expect_refused([](PagedCache& c) { c.shape.part.layer_end = 0; }, "layers", "0 to 0");
  expect_refused([](PagedCache& c) { c.shape.part.head_begin = 7; }, "heads", "7 to 4");
  expect_refused([](PagedCache& c) { c.shape.tokens = 0; }, "tokens", "0");
  expect_refused([](PagedCache& c) { c.shape.tokens = 1 << 21; }, "tokens", "2097152");
  expect_refused([](PagedCache& c) { c.shape.block_tokens = 0; }, "block_tokens", "0");
  expect_refused([](PagedCache& c) { c.shape.block_tokens = 48; }, "block_tokens", "48");
  expect_refused([](PagedCache& c) { c.shape.block_tokens = 512; }, "block_tokens", "512");
  expect_refused([](PagedCache& c) { c.shape.planes = 0; }, "planes", "0");
  expect_refused([](PagedCache& c) { c.shape.planes = 3; }, "planes", "3");
  expect_refused([](PagedCache& c) { c.shape.row_bytes = 0; }, "row_bytes", "0");
  expect_refused([](PagedCache& c) { c.shape.row_bytes = (1u << 30) + 1; }, "row_bytes", "1073741825");
  expect_refused([](PagedCache& c) { c.shape.page_bytes = 5; }, "page_bytes", "5");
  expect_refused([](PagedCache& c) { c.block_count = 0; }, "block_count", "0");
  expect_refused([](PagedCache& c) { c.block_count = 1u << 31; }, "block_count", "2147483648");
}

TEST(PagedCacheTest, a_payload_beyond_a_tebibyte_is_refused) {
  expect_refused(
      [](PagedCache& c) {
        c.shape.tokens = 1 << 20;
        c.shape.row_bytes = 1 << 30;
      },
      "payload", "1073741824");
}

TEST(PagedCacheTest, planes_that_do_not_match_the_shape_are_refused) {
  expect_refused([](PagedCache& c) { c.layers.pop_back(); }, "1 layers", "2");
  expect_refused([](PagedCache& c) { c.layers[1].pop_back(); }, "layer 1", "1 planes");
  expect_refused([](PagedCache& c) { c.layers[1][1].base = nullptr; }, "base of layer 1 plane 1", "null");
}

TEST(PagedCacheTest, strides_that_make_cells_overlap_are_refused) {
  expect_refused([](PagedCache& c) { c.layers[0][0].head_stride = 0; }, "head_stride of layer 0 plane 0",
                 "0");
  expect_refused([](PagedCache& c) { c.layers[1][0].token_stride = kRow; }, "of layer 1 plane 0", "128");
  expect_refused([](PagedCache& c) { c.layers[0][1].head_stride = kRow - 1; }, "head_stride", "127");
  expect_refused([](PagedCache& c) { c.layers[0][1].block_stride -= 1; }, "block_stride", "8191");
  expect_refused([](PagedCache& c) { c.layers[0][1].block_stride = -8191; }, "block_stride", "-8191");
}

TEST(PagedCacheTest, strides_beyond_the_address_space_are_refused_without_overflow) {
  for (const int64_t stride : {std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()}) {
    expect_refused([=](PagedCache& c) { c.layers[0][0].block_stride = stride; }, "block_stride",
                   std::to_string(stride));
    expect_refused([=](PagedCache& c) { c.layers[0][0].token_stride = stride; }, "token_stride",
                   std::to_string(stride));
  }
}

TEST(PagedCacheTest, one_block_needs_no_block_stride) {
  PagedCache cache = valid_cache();
  cache.block_count = 1;
  cache.layers[0][0].block_stride = 0;
  EXPECT_TRUE(validate(cache).has_value());
}

TEST(PagedCacheTest, opaque_pages_that_do_not_add_up_are_refused) {
  PagedCache cache = valid_opaque();
  cache.layers[1][0].piece_bytes = 1999;
  expect_refused(cache, "layer 1", "2999");
  cache = valid_opaque();
  cache.layers[0].clear();
  expect_refused(cache, "layer 0", "0 bytes");
  cache = valid_opaque();
  cache.layers[0][1].piece_bytes = 0;
  expect_refused(cache, "piece_bytes of layer 0 piece 1", "0");
  cache = valid_opaque();
  cache.layers[0][1].base = nullptr;
  expect_refused(cache, "base of layer 0 piece 1", "null");
  cache = valid_opaque();
  cache.layers[0][1].block_stride = 999;
  expect_refused(cache, "block_stride", "999");
  cache = valid_opaque();
  cache.shape.part.head_end = 2;
  expect_refused(cache, "heads", "0 to 2");
  cache = valid_opaque();
  cache.shape.row_bytes = 128;
  expect_refused(cache, "row_bytes", "128");
  cache = valid_opaque();
  cache.shape.page_bytes = 0;
  expect_refused(cache, "page_bytes", "0");
}

}  // namespace
}  // namespace tokendepot
