// The header in front of every extent: who it is, where it belongs, what its bytes hash to.
//
// Effect of damage: a header that does not decode, or names another key, namespace, segment or offset than
// asked, makes the extent absent; a shard whose digest differs makes it corrupt. Others are not concerned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "tokendepot/error.h"
#include "tokendepot/key.h"
#include "tokendepot/layout.h"
#include "tokendepot/plan.h"

namespace tokendepot {

inline constexpr uint32_t kFormatVersion = 1;

struct ExtentHeader {
  Key key;
  NamespaceDigest ns;
  SegmentId segment;    // where it was written; a copy elsewhere does not match
  uint64_t offset = 0;  // of this header in the segment
  uint16_t group = 0;
  LayoutKind kind = LayoutKind::canonical;
  Part part;
  uint32_t tokens = 0;
  uint32_t block_tokens = 0;
  uint16_t planes = 0;
  uint32_t row_bytes = 0;               // canonical
  uint32_t page_bytes = 0;              // opaque
  uint64_t stored_at_ns = 0;            // wall clock, information only
  std::vector<uint64_t> shard_digests;  // one per shard

  GroupShape shape() const;  // the GroupShape that wrote it
  void set_shape(const GroupShape& shape);
};

/// Bytes of the header for this many shards: a multiple of 4 KiB. The payload starts right behind it.
uint64_t extent_header_bytes(uint32_t shards);
/// Header and payload of one extent of this shape: a multiple of 4 KiB.
uint64_t extent_bytes(const GroupShape& shape);

/// Writes exactly extent_header_bytes(shard count) bytes to the front of `out`, the unused tail zeroed.
void encode_extent_header(const ExtentHeader& header, std::span<std::byte> out);

/// Decodes the header at the front of `bytes` (which may be longer). `corrupt` when magic, digest, sizes or
/// reserved bytes are off, `unsupported` for another format version. Never allocates more than bytes.size().
Result<ExtentHeader> decode_extent_header(std::span<const std::byte> bytes);

}  // namespace tokendepot
