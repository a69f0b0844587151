#include "device/host_kernels.h"

#include <algorithm>

#include "base/check.h"
#include "device/stream_copy.h"
#include "format/digest.h"

// Both kernels may run inside a mapping guard, which leaves them by a jump: nothing here allocates, locks or
// has a destructor.
namespace tokendepot {
namespace {

struct Range {
  uint32_t begin;
  uint32_t end;
};

Range overlap(uint32_t a_begin, uint32_t a_end, uint32_t b_begin, uint32_t b_end) {
  const uint32_t begin = std::max(a_begin, b_begin);
  return {begin, std::max(begin, std::min(a_end, b_end))};
}

/// Address of the first byte of a head's rows (canonical) or of a piece (opaque) in one block.
std::byte* address(const Plane& plane, int32_t block, uint32_t head) {
  return plane.base + int64_t{block} * plane.block_stride + int64_t{head} * plane.head_stride;
}

/// One block's rows of one head in one plane. Rows that touch in memory are one row.
struct Rows {
  int64_t stride;
  uint64_t bytes;
  uint64_t count;
};

Rows rows_of(const Plane& plane, uint32_t row_bytes, uint32_t block_tokens) {
  if (plane.token_stride == int64_t{row_bytes}) return {0, uint64_t{row_bytes} * block_tokens, 1};
  return {plane.token_stride, row_bytes, block_tokens};
}

void check_blocks(const PagedCache& cache, std::span<const int32_t> blocks, bool may_skip) {
  for (const int32_t id : blocks) {
    TD_CHECK((may_skip && id == kSkipBlock) || (id >= 0 && uint32_t(id) < cache.block_count));
  }
}

void check_scatter(const ScatterWork& work, const GroupShape& from) {
  const GroupShape& to = work.cache->shape;
  TD_CHECK(from.kind == to.kind);
  TD_CHECK(from.group == to.group);
  TD_CHECK(uint64_t{work.first_shard} + work.shards <= from.shards());
  TD_CHECK(work.header->shard_digests.size() == from.shards());
  TD_CHECK(work.payload.size() == work.shards * from.shard_stride());
  TD_CHECK(work.page_digests.empty() || work.page_digests.size() == work.payload.size() / kPageBytes);
  TD_CHECK(to.block_tokens != 0 && from.tokens % to.block_tokens == 0);
  TD_CHECK(work.blocks.size() == from.tokens / to.block_tokens);
  TD_CHECK(work.cache->layers.size() == to.part.layers());
  if (from.kind == LayoutKind::canonical) {
    TD_CHECK(from.planes == to.planes && from.row_bytes == to.row_bytes);
  } else {
    TD_CHECK(from.block_tokens == to.block_tokens && from.page_bytes == to.page_bytes);
    TD_CHECK(from.part.head_begin == to.part.head_begin && from.part.head_end == to.part.head_end);
  }
  check_blocks(*work.cache, work.blocks, true);
}

bool shards_match(const ScatterWork& work, uint64_t shard_stride) {
  const uint64_t pages = shard_stride / kPageBytes;
  for (uint32_t i = 0; i < work.shards; ++i) {
    const uint64_t digest = work.page_digests.empty()
                                ? shard_digest(work.payload.subspan(i * shard_stride, shard_stride))
                                : shard_digest_of_pages(work.page_digests.subspan(i * pages, pages));
    if (digest != work.header->shard_digests[work.first_shard + i]) return false;
  }
  return true;
}

void scatter_canonical(const ScatterWork& work, const GroupShape& from, CopyRows copy_rows) {
  const PagedCache& cache = *work.cache;
  const GroupShape& to = cache.shape;
  const uint32_t first_head = from.part.head_begin + work.first_shard;
  const Range heads = overlap(first_head, first_head + work.shards, to.part.head_begin, to.part.head_end);
  const Range layers =
      overlap(from.part.layer_begin, from.part.layer_end, to.part.layer_begin, to.part.layer_end);
  const uint64_t block_bytes = uint64_t{to.block_tokens} * to.row_bytes;
  const uint64_t plane_bytes = uint64_t{from.tokens} * to.row_bytes;

  // Heads innermost: where the cache keeps the heads of a token side by side, one block is written in one go.
  for (uint32_t layer = layers.begin; layer < layers.end; ++layer) {
    uint64_t offset = (layer - from.part.layer_begin) * from.planes * plane_bytes;
    for (const Plane& plane : cache.layers[layer - to.part.layer_begin]) {
      const Rows rows = rows_of(plane, to.row_bytes, to.block_tokens);
      for (size_t i = 0; i < work.blocks.size(); ++i) {
        if (work.blocks[i] == kSkipBlock) continue;
        for (uint32_t head = heads.begin; head < heads.end; ++head) {
          const uint64_t shard = (head - first_head) * from.shard_stride();
          copy_rows({.to = address(plane, work.blocks[i], head - to.part.head_begin),
                     .to_stride = rows.stride,
                     .from = work.payload.data() + shard + offset + i * block_bytes,
                     .from_stride = int64_t(rows.bytes),
                     .row_bytes = rows.bytes,
                     .rows = rows.count});
        }
      }
      offset += plane_bytes;
    }
  }
}

void scatter_opaque(const ScatterWork& work, const GroupShape& from, CopyRows copy_rows) {
  const PagedCache& cache = *work.cache;
  const GroupShape& to = cache.shape;
  const uint32_t first_layer = from.part.layer_begin + work.first_shard;
  const Range layers =
      overlap(first_layer, first_layer + work.shards, to.part.layer_begin, to.part.layer_end);
  for (uint32_t layer = layers.begin; layer < layers.end; ++layer) {
    const std::byte* shard = work.payload.data() + (layer - first_layer) * from.shard_stride();
    for (size_t i = 0; i < work.blocks.size(); ++i) {
      if (work.blocks[i] == kSkipBlock) continue;
      const std::byte* source = shard + i * to.page_bytes;
      for (const Plane& piece : cache.layers[layer - to.part.layer_begin]) {
        copy_rows({.to = address(piece, work.blocks[i], 0),
                   .to_stride = 0,
                   .from = source,
                   .from_stride = 0,
                   .row_bytes = piece.piece_bytes,
                   .rows = 1});
        source += piece.piece_bytes;
      }
    }
  }
}

/// Appends one shard to a payload.
class ShardWriter {
 public:
  explicit ShardWriter(std::span<std::byte> shard) : at_(shard.data()), end_(shard.data() + shard.size()) {}

  void append(const std::byte* from, int64_t from_stride, uint64_t row_bytes, uint64_t rows) {
    copy_rows_cached({.to = at_,
                      .to_stride = int64_t(row_bytes),
                      .from = from,
                      .from_stride = from_stride,
                      .row_bytes = row_bytes,
                      .rows = rows});
    at_ += row_bytes * rows;
  }

  void pad() { std::fill(at_, end_, std::byte{0}); }

 private:
  std::byte* at_;
  std::byte* end_;
};

void gather_head(const GatherWork& work, uint32_t head, ShardWriter& shard) {
  const GroupShape& shape = work.cache->shape;
  for (const auto& layer : work.cache->layers) {
    for (const Plane& plane : layer) {
      const Rows rows = rows_of(plane, shape.row_bytes, shape.block_tokens);
      for (const int32_t block : work.blocks) {
        shard.append(address(plane, block, head), rows.stride, rows.bytes, rows.count);
      }
    }
  }
}

void gather_layer(const GatherWork& work, uint32_t layer, ShardWriter& shard) {
  for (const int32_t block : work.blocks) {
    for (const Plane& piece : work.cache->layers[layer]) {
      shard.append(address(piece, block, 0), 0, piece.piece_bytes, 1);
    }
  }
}

}  // namespace

ScatterOutcome verify_and_scatter(const ScatterWork& work) {
  const GroupShape from = work.header->shape();
  check_scatter(work, from);
  if (!shards_match(work, from.shard_stride())) return ScatterOutcome::corrupt;
  const CopyRows copy_rows = stream_copies().front();
  if (from.kind == LayoutKind::canonical) {
    scatter_canonical(work, from, copy_rows);
  } else {
    scatter_opaque(work, from, copy_rows);
  }
  stream_fence();
  return ScatterOutcome::ok;
}

void gather_and_digest(const GatherWork& work) {
  const GroupShape& shape = work.cache->shape;
  TD_CHECK(work.payload.size() == shape.payload_bytes());
  TD_CHECK(work.digests.size() == shape.shards());
  TD_CHECK(work.blocks.size() == shape.blocks());
  TD_CHECK(work.cache->layers.size() == shape.part.layers());
  check_blocks(*work.cache, work.blocks, false);
  for (uint32_t i = 0; i < shape.shards(); ++i) {
    const auto bytes = work.payload.subspan(i * shape.shard_stride(), shape.shard_stride());
    ShardWriter shard(bytes);
    if (shape.kind == LayoutKind::canonical) {
      gather_head(work, i, shard);
    } else {
      gather_layer(work, i, shard);
    }
    shard.pad();
    work.digests[i] = shard_digest(bytes);
  }
}

}  // namespace tokendepot
