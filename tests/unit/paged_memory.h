// Paged caches for tests: any axis order, any padding, and a naive reference that walks them cell by cell.
#pragma once

#include <algorithm>
#include <random>
#include <span>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "format/digest.h"
#include "format/extent.h"
#include "tokendepot/layout.h"

namespace tokendepot::paged_test {

/// One cell is one row of one head, token and plane (canonical), or one page of one block (opaque).
struct Cell {
  uint32_t layer;  // over the whole model
  uint32_t head;   // over the whole model
  uint32_t plane;
  uint32_t token;  // of the extent; opaque: block of the extent
};

/// What a model would have computed: bytes that depend on the cell and on nothing else.
inline std::byte content(const Cell& cell, uint64_t byte) {
  uint64_t x = cell.layer;
  for (const uint64_t part : {uint64_t{cell.head}, uint64_t{cell.plane}, uint64_t{cell.token}, byte}) {
    x = (x ^ part) * 0x9E3779B97F4A7C15ull;
    x ^= x >> 29;
  }
  return std::byte(x >> 17);
}

/// A cache in memory of its own, full of poison.
struct PagedMemory {
  std::vector<std::byte> bytes;
  PagedCache cache;
};

/// `order` names the axes from the outermost to the innermost: B block, L layer, P plane, H head, T token.
/// Every stride is up to `max_gap` bytes larger than it need be, so that there are bytes between cells that
/// must stay untouched.
inline PagedMemory make_canonical(const GroupShape& shape, uint32_t block_count, std::string_view order,
                                  uint32_t max_gap, std::mt19937& random) {
  uint64_t strides[128] = {};
  uint64_t extent = shape.row_bytes;
  for (size_t i = order.size(); i-- > 0;) {
    uint64_t count = 0;
    switch (order[i]) {
      case 'B':
        count = block_count;
        break;
      case 'L':
        count = shape.part.layers();
        break;
      case 'P':
        count = shape.planes;
        break;
      case 'H':
        count = shape.part.heads();
        break;
      case 'T':
        count = shape.block_tokens;
        break;
      default:
        TD_CHECK(false);
    }
    extent += max_gap == 0 ? 0 : random() % (max_gap + 1);
    strides[size_t(order[i])] = extent;
    extent *= count;
  }
  PagedMemory memory;
  memory.bytes.resize(extent + max_gap);
  for (std::byte& byte : memory.bytes) byte = std::byte(random());
  memory.cache.shape = shape;
  memory.cache.block_count = block_count;
  for (uint64_t layer = 0; layer < shape.part.layers(); ++layer) {
    std::vector<Plane> planes;
    for (uint64_t plane = 0; plane < shape.planes; ++plane) {
      planes.push_back({.base = memory.bytes.data() + layer * strides['L'] + plane * strides['P'],
                        .block_stride = int64_t(strides['B']),
                        .head_stride = int64_t(strides['H']),
                        .token_stride = int64_t(strides['T'])});
    }
    memory.cache.layers.push_back(std::move(planes));
  }
  return memory;
}

/// Pages of `pieces.size()` pieces, each piece in an array of its own with a gap behind every block.
inline PagedMemory make_opaque(const GroupShape& shape, uint32_t block_count,
                               std::span<const uint32_t> pieces, uint32_t gap, std::mt19937& random) {
  PagedMemory memory;
  memory.cache.shape = shape;
  memory.cache.block_count = block_count;
  memory.bytes.resize(uint64_t{shape.part.layers()} * block_count * (shape.page_bytes + pieces.size() * gap));
  for (std::byte& byte : memory.bytes) byte = std::byte(random());
  std::byte* at = memory.bytes.data();
  for (uint32_t layer = 0; layer < shape.part.layers(); ++layer) {
    std::vector<Plane> planes;
    for (const uint32_t piece : pieces) {
      planes.push_back({.base = at, .block_stride = int64_t{piece} + gap, .piece_bytes = piece});
      at += uint64_t{block_count} * (piece + gap);
    }
    memory.cache.layers.push_back(std::move(planes));
  }
  return memory;
}

/// Address of one byte of a cell in the cache, nullptr where the cell is not this cache's or its block is
/// skipped.
inline std::byte* find(const PagedCache& cache, std::span<const int32_t> blocks, const Cell& cell,
                       uint64_t byte) {
  const Part& part = cache.shape.part;
  if (cell.layer < part.layer_begin || cell.layer >= part.layer_end) return nullptr;
  if (cell.head < part.head_begin || cell.head >= part.head_end) return nullptr;
  const auto& planes = cache.layers[cell.layer - part.layer_begin];
  if (cache.shape.kind == LayoutKind::opaque) {
    if (blocks[cell.token] == kSkipBlock) return nullptr;
    size_t piece = 0;
    while (byte >= planes[piece].piece_bytes) byte -= planes[piece++].piece_bytes;
    return planes[piece].base + blocks[cell.token] * planes[piece].block_stride + int64_t(byte);
  }
  const int32_t block = blocks[cell.token / cache.shape.block_tokens];
  if (block == kSkipBlock) return nullptr;
  const Plane& plane = planes[cell.plane];
  return plane.base + block * plane.block_stride + int64_t{cell.head - part.head_begin} * plane.head_stride +
         int64_t{cell.token % cache.shape.block_tokens} * plane.token_stride + int64_t(byte);
}

/// Calls `visit(cell, cell bytes, offset in the payload)` for every cell of an extent.
template <typename Visit>
void for_each_cell(const GroupShape& shape, Visit visit) {
  const Part& part = shape.part;
  if (shape.kind == LayoutKind::opaque) {
    for (uint32_t layer = part.layer_begin; layer < part.layer_end; ++layer) {
      for (uint32_t block = 0; block < shape.blocks(); ++block) {
        visit(Cell{layer, part.head_begin, 0, block}, shape.page_bytes,
              (layer - part.layer_begin) * shape.shard_stride() + uint64_t{block} * shape.page_bytes);
      }
    }
    return;
  }
  for (uint32_t head = part.head_begin; head < part.head_end; ++head) {
    uint64_t offset = (head - part.head_begin) * shape.shard_stride();
    for (uint32_t layer = part.layer_begin; layer < part.layer_end; ++layer) {
      for (uint32_t plane = 0; plane < shape.planes; ++plane) {
        for (uint32_t token = 0; token < shape.tokens; ++token, offset += shape.row_bytes) {
          visit(Cell{layer, head, plane, token}, shape.row_bytes, offset);
        }
      }
    }
  }
}

/// The payload that a writer of this shape would store.
inline std::vector<std::byte> reference_payload(const GroupShape& shape) {
  std::vector<std::byte> payload(shape.payload_bytes());
  for_each_cell(shape, [&](const Cell& cell, uint64_t bytes, uint64_t offset) {
    for (uint64_t i = 0; i < bytes; ++i) payload[offset + i] = content(cell, i);
  });
  return payload;
}

/// Writes every cell of `extent` that is this cache's into its blocks.
inline void reference_scatter(const GroupShape& extent, const PagedCache& cache,
                              std::span<const int32_t> blocks) {
  for_each_cell(extent, [&](const Cell& cell, uint64_t bytes, uint64_t) {
    for (uint64_t i = 0; i < bytes; ++i) {
      if (std::byte* at = find(cache, blocks, cell, i)) *at = content(cell, i);
    }
  });
}

inline ExtentHeader header_of(const GroupShape& shape, std::span<const std::byte> payload) {
  ExtentHeader header;
  header.set_shape(shape);
  for (uint32_t i = 0; i < shape.shards(); ++i) {
    header.shard_digests.push_back(
        shard_digest(payload.subspan(i * shape.shard_stride(), shape.shard_stride())));
  }
  return header;
}

/// `count` different block ids in no order.
inline std::vector<int32_t> pick_blocks(uint32_t count, uint32_t block_count, std::mt19937& random) {
  std::vector<int32_t> ids(block_count);
  for (uint32_t i = 0; i < block_count; ++i) ids[i] = int32_t(i);
  std::shuffle(ids.begin(), ids.end(), random);
  ids.resize(count);
  return ids;
}

}  // namespace tokendepot::paged_test
