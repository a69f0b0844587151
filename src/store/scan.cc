#include "store/scan.h"

#include <algorithm>
#include <memory>

#include "base/errors.h"
#include "base/log.h"
#include "format/digest.h"

namespace tokendepot {
namespace {

constexpr uint64_t kWindow = 1 << 20;
constexpr uint64_t kLongestHeader = 16 * kPageBytes;  // 8,000 shards
// Of what a file occupies: the search for headers reads it up to twice, the digests of whole extents once,
// those of torn ones once more.
constexpr uint64_t kOfAllocated = 4;

/// Page-aligned memory, so that the same code reads files opened with O_DIRECT.
struct AlignedBuffer {
  explicit AlignedBuffer(uint64_t bytes)
      : memory(static_cast<std::byte*>(std::aligned_alloc(kPageBytes, align_up(bytes))), &std::free),
        size(bytes) {}
  std::unique_ptr<std::byte, void (*)(void*)> memory;
  uint64_t size;
  std::span<std::byte> first(uint64_t bytes) { return {memory.get(), bytes}; }
};

/// False when the budget does not have them; then nothing is left of it.
bool charge(ScanBudget& budget, uint64_t bytes) {
  const bool paid = bytes <= budget.bytes;
  budget.bytes -= std::min(bytes, budget.bytes);
  return paid;
}

/// Reads piece by piece: a shard may be larger than the memory of the machine that recovers it.
bool payload_is_whole(const File& file, const ExtentHeader& header, uint64_t payload_offset,
                      ScanBudget& budget) {
  const GroupShape shape = header.shape();
  AlignedBuffer window(std::min(kWindow, shape.shard_stride()));
  ShardDigest digest;
  for (uint32_t i = 0; i < shape.shards(); ++i) {
    for (uint64_t at = 0; at < shape.shard_stride(); at += window.size) {
      const auto piece = window.first(std::min(window.size, shape.shard_stride() - at));
      if (!charge(budget, piece.size())) return false;
      if (!file.read_at(piece, payload_offset + i * shape.shard_stride() + at)) return false;
      digest.add(piece);
    }
    if (digest.take() != header.shard_digests[i]) return false;
  }
  return true;
}

}  // namespace

Result<uint64_t> credible_bytes(const File& file) {
  constexpr uint64_t kOnItsWord = 1ull << 30;  // file systems may tell too little of what a file occupies
  const auto size = file.size();
  if (!size) return size;
  const auto allocated = file.allocated();
  if (!allocated) return allocated;
  return std::min(*size, kOnItsWord + kOfAllocated * *allocated);
}

Result<uint64_t> scan_extents(const File& file, const SegmentId& id, uint64_t from, bool verify,
                              const std::function<void(const ExtentHeader&, uint64_t bytes)>& visit,
                              uint64_t patience, ScanBudget* budget) {
  const auto size = credible_bytes(file);
  if (!size) return std::unexpected(size.error());
  const auto allocated = file.allocated();
  if (!allocated) return std::unexpected(allocated.error());
  ScanBudget own;
  ScanBudget& left = budget != nullptr ? *budget : own;
  left.bytes += kOfAllocated * *allocated;
  AlignedBuffer window(kWindow);
  uint64_t window_at = 0;
  uint64_t window_bytes = 0;
  uint64_t end = from;
  for (uint64_t at = align_up(from); at < *size && kPageBytes <= *size - at && at - end < patience;) {
    const uint64_t ahead = std::min(kLongestHeader, (*size - at) / kPageBytes * kPageBytes);
    if (at < window_at || at + ahead > window_at + window_bytes) {
      window_at = at;
      window_bytes = std::min(kWindow, (*size - at) / kPageBytes * kPageBytes);
      if (!charge(left, window_bytes)) break;
      if (auto read = file.read_at(window.first(window_bytes), at); !read)
        return std::unexpected(read.error());
    }
    const auto header = decode_extent_header({window.memory.get() + (at - window_at), ahead});
    if (!header || header->segment != id || header->offset != at) {
      at += kPageBytes;
      continue;
    }
    const uint64_t head = extent_header_bytes(static_cast<uint32_t>(header->shard_digests.size()));
    const uint64_t bytes = head + header->shape().payload_bytes();
    if (bytes > *size - at || (verify && !payload_is_whole(file, *header, at + head, left))) {
      if (left.bytes == 0) break;
      at += kPageBytes;
      continue;
    }
    visit(*header, bytes);
    at += bytes;
    end = at;
  }
  if (left.bytes == 0)
    log(LogLevel::warning, "{}: not searched for extents behind byte {}: too much was read of what is none",
        file.path(), end);
  return end;
}

Record put_of(const ExtentHeader& header, uint64_t bytes) {
  Record put;
  put.type = RecordType::put;
  put.kind = header.kind;
  put.group = header.group;
  put.key = header.key;
  put.ns_prefix = prefix_of(header.ns);
  put.where = {header.segment, header.offset, bytes};
  put.part = header.part;
  put.tokens = header.tokens;
  put.time_ns = header.stored_at_ns;
  return put;
}

}  // namespace tokendepot
