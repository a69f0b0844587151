#include "store/extent_check.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "base/errors.h"
#include "format/digest.h"
#include "format/journal.h"

namespace tokendepot {
namespace {

constexpr uint64_t kPiece = 1 << 20;
static_assert(kPiece % kPageBytes == 0);

}  // namespace

StoredExtent extent_of(const Record& put) {
  return {put.key, put.ns_prefix, put.group, put.kind, put.part, put.tokens, put.where, put.time_ns};
}

Record record_of(const StoredExtent& extent) {
  Record record;
  record.kind = extent.kind;
  record.group = extent.group;
  record.key = extent.key;
  record.where = extent.where;
  record.part = extent.part;
  record.tokens = extent.tokens;
  return record;
}

void drop_overlapping(std::vector<StoredExtent>& extents) {
  const auto end_of = [](const StoredExtent& extent) { return extent.where.offset + extent.where.bytes; };
  size_t kept = 0;
  for (size_t i = 0; i < extents.size(); ++i) {
    const StoredExtent extent = extents[i];
    if (kept > 0 && extents[kept - 1].where.segment == extent.where.segment &&
        extent.where.offset < end_of(extents[kept - 1])) {
      if (end_of(extent) < end_of(extents[kept - 1])) extents[kept - 1] = extent;
      continue;
    }
    extents[kept++] = extent;
  }
  extents.erase(extents.begin() + static_cast<ptrdiff_t>(kept), extents.end());
}

Status check_header(const ExtentHeader& header, const StoredExtent& extent, const std::string& where) {
  if (header.segment != extent.where.segment || header.offset != extent.where.offset) {
    return fail(ErrorKind::corrupt, "{}: the header belongs to another place", where);
  }
  if (header.key != extent.key || prefix_of(header.ns) != extent.ns_prefix) {
    return fail(ErrorKind::corrupt, "{}: the header names another key or namespace than the journal", where);
  }
  if (header.group != extent.group || header.kind != extent.kind || header.part != extent.part ||
      header.tokens != extent.tokens || extent_bytes(header.shape()) != extent.where.bytes) {
    return fail(ErrorKind::corrupt, "{}: the header describes another shape than the journal", where);
  }
  return {};
}

Status check_payload(const ExtentHeader& header, std::span<const std::byte> extent,
                     const std::string& where) {
  const GroupShape shape = header.shape();
  const uint64_t stride = shape.shard_stride();
  const auto payload = extent.subspan(extent_header_bytes(shape.shards()));
  for (uint32_t i = 0; i < shape.shards(); ++i) {
    if (shard_digest(payload.subspan(i * stride, stride)) != header.shard_digests[i]) {
      return fail(ErrorKind::corrupt, "{}: shard {} of {} differs from its digest", where, i, shape.shards());
    }
  }
  return {};
}

Status check_extent(const File& file, uint64_t file_bytes, const StoredExtent& extent,
                    const std::string& where, const std::function<bool(uint64_t bytes)>& may_read) {
  const uint32_t shards = extent.kind == LayoutKind::canonical ? extent.part.heads() : extent.part.layers();
  const uint64_t header_bytes = extent_header_bytes(shards);
  if (extent.where.offset > file_bytes || extent.where.bytes > file_bytes - extent.where.offset ||
      header_bytes > extent.where.bytes) {
    return fail(ErrorKind::corrupt, "{}: the extent of {} bytes ends behind the {} bytes that are there",
                where, extent.where.bytes, file_bytes);
  }
  const uint64_t room = std::max(header_bytes, std::min(kPiece, extent.where.bytes));
  const std::unique_ptr<std::byte, void (*)(void*)> memory(
      static_cast<std::byte*>(std::aligned_alloc(kPageBytes, room)), &std::free);
  const auto read = [&](uint64_t bytes, uint64_t at) -> Status {
    if (may_read && !may_read(bytes)) return fail(ErrorKind::closed, "{}: not checked to its end", where);
    return file.read_at({memory.get(), bytes}, at);
  };
  if (auto got = read(header_bytes, extent.where.offset); !got) return got;
  const auto header = decode_extent_header({memory.get(), header_bytes});
  if (!header) return fail(header.error().kind, "{}: {}", where, header.error().message);
  if (auto same = check_header(*header, extent, where); !same) return same;

  const uint64_t stride = header->shape().shard_stride();
  const uint64_t payload_at = extent.where.offset + header_bytes;
  ShardDigest digest;
  for (size_t shard = 0; shard < header->shard_digests.size(); ++shard) {
    for (uint64_t at = 0; at < stride; at += kPiece) {
      const uint64_t bytes = std::min(kPiece, stride - at);
      if (auto got = read(bytes, payload_at + shard * stride + at); !got) return got;
      digest.add({memory.get(), bytes});
    }
    if (digest.take() != header->shard_digests[shard]) {
      return fail(ErrorKind::corrupt, "{}: shard {} of {} differs from its digest", where, shard,
                  header->shard_digests.size());
    }
  }
  return {};
}

}  // namespace tokendepot
