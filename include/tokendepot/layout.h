// How one KV-cache group lies in the engine's paged cache, and how its chunks are cut into shards of an
// extent.
//
// Canonical payload:  [head][layer][plane: K, V][token][dim]   one shard = one KV head
// Opaque payload:     [layer][block][page bytes]               one shard = one layer
// Each shard starts on a 4 KiB boundary of the payload; the gap behind it is zero. See docs/format.md,
// "Extent".
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tokendepot/error.h"

namespace tokendepot {

inline constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t align_up(uint64_t value, uint64_t to = kPageBytes) {
  return (value + to - 1) / to * to;
}

enum class LayoutKind : uint8_t {
  canonical = 1,  // K/V rows described by strides; exchangeable between tensor-parallel sizes
  opaque = 2,     // whole pages as the engine packs them; exchangeable only with an equal engine
};

/// The rectangle of a group's KV that one extent holds or one reader wants: layers x heads, half-open,
/// numbered over the whole model (all ranks). Opaque layouts use [rank, rank + 1) as heads.
struct Part {
  uint16_t layer_begin = 0;
  uint16_t layer_end = 0;
  uint16_t head_begin = 0;
  uint16_t head_end = 0;
  bool operator==(const Part&) const = default;
  bool intersects(const Part& o) const {
    return layer_begin < o.layer_end && o.layer_begin < layer_end && head_begin < o.head_end &&
           o.head_begin < head_end;
  }
  bool contains(const Part& o) const {
    return layer_begin <= o.layer_begin && o.layer_end <= layer_end && head_begin <= o.head_begin &&
           o.head_end <= head_end;
  }
  uint32_t layers() const { return layer_end - layer_begin; }
  uint32_t heads() const { return head_end - head_begin; }
};

/// Shape of the extents that one writer cuts from one group. All ranks of a namespace agree on everything but
/// `part`.
struct GroupShape {
  uint16_t group = 0;
  LayoutKind kind = LayoutKind::canonical;
  Part part;
  uint32_t tokens =
      0;  // tokens held per chunk: the chunk's last `tokens` (all of them but for short windows)
  uint32_t block_tokens = 0;  // tokens per block of the engine; divides `tokens`
  uint16_t planes = 2;        // canonical: 2 = K and V, 1 = one tensor (MLA)
  uint32_t row_bytes = 0;     // canonical: bytes of one head's row of one token in one plane
  uint32_t page_bytes = 0;    // opaque: bytes of one block of one layer (all pieces together)

  uint32_t blocks() const { return tokens / block_tokens; }
  uint32_t shards() const { return kind == LayoutKind::canonical ? part.heads() : part.layers(); }
  uint64_t shard_bytes() const {
    return kind == LayoutKind::canonical ? uint64_t{part.layers()} * planes * tokens * row_bytes
                                         : uint64_t{blocks()} * page_bytes;
  }
  uint64_t shard_stride() const { return align_up(shard_bytes()); }
  uint64_t payload_bytes() const { return shards() * shard_stride(); }
};

/// One strided view of one layer: the address of (block b, head h, token t) is
/// base + b * block_stride + h * head_stride + t * token_stride, with h counted from the writer's first head.
/// Opaque: the piece of block b is `piece_bytes` bytes at base + b * block_stride; the other strides are
/// unused.
struct Plane {
  std::byte* base = nullptr;
  int64_t block_stride = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;
  uint32_t piece_bytes = 0;
};

/// The engine's paged KV cache of one group on one device. The memory is lent: it must outlive the Depot it
/// is attached to. Canonical: `shape.planes` planes a layer. Opaque: 1 or more pieces a layer whose bytes add
/// up to `shape.page_bytes`.
struct PagedCache {
  GroupShape shape;
  uint32_t block_count = 0;                // blocks in the cache; ids in [0, block_count)
  std::vector<std::vector<Plane>> layers;  // [layer of part][plane or piece]
};

/// Checks every relation above; the error names the field, its value and what is allowed. Call before use.
Status validate(const PagedCache& cache);

}  // namespace tokendepot
