#include "workload/extent_shape.h"

#include "base/check.h"

namespace tokendepot {
namespace {

constexpr uint32_t kRowBytes = 256;
constexpr uint32_t kBlockTokens = 16;

}  // namespace

GroupShape shape_of_bytes(uint16_t group, uint64_t bytes) {
  TD_CHECK(bytes >= kSmallestExtent && bytes <= kLargestExtent && bytes % kPageBytes == 0);
  GroupShape shape;
  shape.group = group;
  shape.row_bytes = kRowBytes;
  shape.block_tokens = kBlockTokens;
  shape.planes = bytes % (2 * kPageBytes) == 0 ? 2 : 1;
  uint16_t heads = 8;
  while (bytes % (uint64_t{heads} * shape.planes * kPageBytes) != 0) heads /= 2;
  const uint64_t rows = bytes / (uint64_t{heads} * shape.planes * kRowBytes);
  shape.tokens = 256;
  while (rows % shape.tokens != 0) shape.tokens /= 2;
  shape.part = {0, static_cast<uint16_t>(rows / shape.tokens), 0, heads};
  return shape;
}

PagedCache cache_of_slots(const GroupShape& shape, std::byte* base, uint32_t slots) {
  const auto head = int64_t{shape.block_tokens} * shape.row_bytes;
  const int64_t plane = head * static_cast<int64_t>(shape.part.heads());
  const int64_t block = plane * shape.planes * static_cast<int64_t>(shape.part.layers());
  PagedCache cache;
  cache.shape = shape;
  cache.block_count = slots * shape.blocks();
  for (int64_t layer = 0; layer < static_cast<int64_t>(shape.part.layers()); ++layer) {
    auto& planes = cache.layers.emplace_back();
    for (int64_t p = 0; p < shape.planes; ++p)
      planes.push_back({base + (layer * shape.planes + p) * plane, block, head, shape.row_bytes, 0});
  }
  return cache;
}

}  // namespace tokendepot
