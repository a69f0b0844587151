#include "store/carry.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "base/errors.h"
#include "format/digest.h"
#include "format/extent.h"
#include "io/mapping.h"

namespace tokendepot {
namespace {

constexpr uint64_t kPiece = 1 << 20;
constexpr uint64_t kLongestHeader = 16 * kPageBytes;  // 8,000 shards; what has more is not carried

Status write_there(const RootWriter& target, const RootWriter::Place& place, std::span<const std::byte> bytes,
                   uint64_t at) {
  if (!place.segment->mapping.is_mapped())
    return place.segment->file.write_at(bytes, place.where.offset + at);
  std::byte* const to = place.segment->mapping.data() + place.where.offset + at;
  auto copy = [to, bytes] { std::memcpy(to, bytes.data(), bytes.size()); };
  if (guard_mapping(std::span<const std::byte>(to, bytes.size()), copy)) return {};
  return fail(ErrorKind::io, "root \"{}\": {} was cut short", target.root_path(),
              segment_name(place.where.segment));
}

}  // namespace

Status carry_extent(const File& source, const Record& put, RootWriter& target, const RootWriter::Place& place,
                    const std::function<bool()>& go_on) {
  const std::unique_ptr<std::byte, void (*)(void*)> memory(
      static_cast<std::byte*>(std::aligned_alloc(kPageBytes, kPiece)), &std::free);
  const ExtentRef& from = put.where;
  const auto head = std::span(memory.get(), std::min(from.bytes, kLongestHeader));
  if (auto read = source.read_at(head, from.offset); !read) return read;
  auto header = decode_extent_header(head);
  if (!header || header->segment != from.segment || header->offset != from.offset || header->key != put.key ||
      header->group != put.group || prefix_of(header->ns) != put.ns_prefix) {
    return fail(ErrorKind::not_found, "{} holds another extent at {} than the journal says",
                segment_name(from.segment), from.offset);
  }
  const GroupShape shape = header->shape();
  const uint64_t header_bytes = extent_header_bytes(shape.shards());
  if (header_bytes + shape.payload_bytes() != from.bytes || from.bytes != place.where.bytes) {
    return fail(ErrorKind::not_found, "{} holds an extent of another size at {} than the journal says",
                segment_name(from.segment), from.offset);
  }
  ShardDigest digest;
  for (uint32_t shard = 0; shard < shape.shards(); ++shard) {
    for (uint64_t at = 0; at < shape.shard_stride(); at += kPiece) {
      if (!go_on()) return fail(ErrorKind::closed, "interrupted");
      const auto piece = std::span(memory.get(), std::min(kPiece, shape.shard_stride() - at));
      const uint64_t offset = header_bytes + shard * shape.shard_stride() + at;
      if (auto read = source.read_at(piece, from.offset + offset); !read) return read;
      digest.add(piece);
      if (auto written = write_there(target, place, piece, offset); !written) return written;
    }
    if (digest.take() != header->shard_digests[shard]) {
      return fail(ErrorKind::corrupt, "{} holds other bytes at {} than were stored",
                  segment_name(from.segment), from.offset);
    }
  }
  header->segment = place.where.segment;
  header->offset = place.where.offset;
  const auto encoded = std::span(memory.get(), header_bytes);
  encode_extent_header(*header, encoded);
  if (auto written = write_there(target, place, encoded, 0); !written) return written;
  // A copy is as old as its original: times to live are counted from the store.
  Record copy = put;
  copy.time_ns = header->stored_at_ns;
  if (auto known = target.acknowledge(place, copy); !known) return known;
  target.touch(place.slot);  // but it was used now
  return {};
}

}  // namespace tokendepot
