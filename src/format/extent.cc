#include "format/extent.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "base/bytes.h"
#include "base/errors.h"
#include "format/digest.h"
#include "format/shape.h"

namespace tokendepot {
namespace {

constexpr std::string_view kMagic = "TDEXTENT";
constexpr size_t kVersionAt = 8;
constexpr size_t kHeaderBytesAt = 12;
constexpr size_t kKeyAt = 16;
constexpr size_t kNamespaceAt = 48;
constexpr size_t kWriterAt = 80;
constexpr size_t kSequenceAt = 88;
constexpr size_t kShardsAt = 92;
constexpr size_t kOffsetAt = 96;
constexpr size_t kPayloadBytesAt = 104;
constexpr size_t kShardStrideAt = 112;
constexpr size_t kShardBytesAt = 120;
constexpr size_t kStoredAtAt = 128;
constexpr size_t kGroupAt = 136;
constexpr size_t kKindAt = 138;
constexpr size_t kReserved1At = 139;
constexpr size_t kPartAt = 140;
constexpr size_t kTokensAt = 148;
constexpr size_t kBlockTokensAt = 152;
constexpr size_t kPlanesAt = 156;
constexpr size_t kReserved2At = 158;
constexpr size_t kRowBytesAt = 160;
constexpr size_t kPageBytesAt = 164;
constexpr size_t kDigestAt = 168;
constexpr size_t kReserved3At = 176;
constexpr size_t kShardDigestsAt = 256;
constexpr size_t kMaxHeaderPages = align_up(kShardDigestsAt + size_t{8} * kMaxShards) / kPageBytes;

// Taken with the digest field as zero, page by page like a shard's, so that the kernel that digests shards
// can form a header too.
uint64_t header_digest(std::span<const std::byte> header) {
  std::array<std::byte, kPageBytes> first;
  std::memcpy(first.data(), header.data(), kPageBytes);
  put_le<uint64_t>(first, kDigestAt, 0);
  std::array<uint64_t, kMaxHeaderPages> digests;
  digests[0] = xxh3(first);
  const size_t pages = header.size() / kPageBytes;
  for (size_t i = 1; i < pages; ++i) digests[i] = xxh3(header.subspan(i * kPageBytes, kPageBytes));
  return shard_digest_of_pages(std::span(digests).first(pages));
}

bool all_zero(std::span<const std::byte> bytes) {
  // The first byte is zero and every byte equals the next: vectorised by any C library.
  return bytes.empty() ||
         (bytes[0] == std::byte{0} && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0);
}

// Everything but the shard digests. The header's digest has been checked.
Result<ExtentHeader> decode_fields(std::span<const std::byte> in) {
  ExtentHeader header;
  std::memcpy(header.key.bytes.data(), in.data() + kKeyAt, header.key.bytes.size());
  std::memcpy(header.ns.bytes.data(), in.data() + kNamespaceAt, header.ns.bytes.size());
  header.segment.writer = get_le<uint64_t>(in, kWriterAt);
  header.segment.sequence = get_le<uint32_t>(in, kSequenceAt);
  header.offset = get_le<uint64_t>(in, kOffsetAt);
  header.stored_at_ns = get_le<uint64_t>(in, kStoredAtAt);
  header.group = get_le<uint16_t>(in, kGroupAt);
  header.kind = static_cast<LayoutKind>(get_le<uint8_t>(in, kKindAt));
  header.part.layer_begin = get_le<uint16_t>(in, kPartAt);
  header.part.layer_end = get_le<uint16_t>(in, kPartAt + 2);
  header.part.head_begin = get_le<uint16_t>(in, kPartAt + 4);
  header.part.head_end = get_le<uint16_t>(in, kPartAt + 6);
  header.tokens = get_le<uint32_t>(in, kTokensAt);
  header.block_tokens = get_le<uint32_t>(in, kBlockTokensAt);
  header.planes = get_le<uint16_t>(in, kPlanesAt);
  header.row_bytes = get_le<uint32_t>(in, kRowBytesAt);
  header.page_bytes = get_le<uint32_t>(in, kPageBytesAt);
  const GroupShape shape = header.shape();
  if (Status ok = check_shape(shape); !ok) {
    return fail(ErrorKind::corrupt, "extent header has a shape that cannot be: {}", ok.error().message);
  }
  if (get_le<uint32_t>(in, kShardsAt) != shape.shards() ||
      get_le<uint64_t>(in, kShardBytesAt) != shape.shard_bytes() ||
      get_le<uint64_t>(in, kShardStrideAt) != shape.shard_stride() ||
      get_le<uint64_t>(in, kPayloadBytesAt) != shape.payload_bytes()) {
    return fail(ErrorKind::corrupt,
                "extent header has sizes that differ from its shape of {} shards of {} bytes", shape.shards(),
                shape.shard_bytes());
  }
  if (header.offset % kPageBytes != 0 || header.offset > kMaxOffset) {
    return fail(ErrorKind::corrupt, "extent header has offset {}, expected a multiple of {}", header.offset,
                kPageBytes);
  }
  return header;
}

}  // namespace

GroupShape ExtentHeader::shape() const {
  return {.group = group,
          .kind = kind,
          .part = part,
          .tokens = tokens,
          .block_tokens = block_tokens,
          .planes = planes,
          .row_bytes = row_bytes,
          .page_bytes = page_bytes};
}

void ExtentHeader::set_shape(const GroupShape& shape) {
  group = shape.group;
  kind = shape.kind;
  part = shape.part;
  tokens = shape.tokens;
  block_tokens = shape.block_tokens;
  planes = shape.planes;
  row_bytes = shape.row_bytes;
  page_bytes = shape.page_bytes;
}

uint64_t extent_header_bytes(uint32_t shards) {
  return align_up(kShardDigestsAt + uint64_t{8} * shards);
}

uint64_t extent_bytes(const GroupShape& shape) {
  return extent_header_bytes(shape.shards()) + shape.payload_bytes();
}

void encode_extent_header(const ExtentHeader& header, std::span<std::byte> out) {
  const GroupShape shape = header.shape();
  TD_CHECK(header.shard_digests.size() == shape.shards());
  const uint64_t header_bytes = extent_header_bytes(shape.shards());
  TD_CHECK(out.size() >= header_bytes);
  out = out.first(header_bytes);
  std::ranges::fill(out, std::byte{0});
  std::memcpy(out.data(), kMagic.data(), kMagic.size());
  put_le<uint32_t>(out, kVersionAt, kFormatVersion);
  put_le<uint32_t>(out, kHeaderBytesAt, static_cast<uint32_t>(header_bytes));
  std::memcpy(out.data() + kKeyAt, header.key.bytes.data(), header.key.bytes.size());
  std::memcpy(out.data() + kNamespaceAt, header.ns.bytes.data(), header.ns.bytes.size());
  put_le<uint64_t>(out, kWriterAt, header.segment.writer);
  put_le<uint32_t>(out, kSequenceAt, header.segment.sequence);
  put_le<uint32_t>(out, kShardsAt, shape.shards());
  put_le<uint64_t>(out, kOffsetAt, header.offset);
  put_le<uint64_t>(out, kPayloadBytesAt, shape.payload_bytes());
  put_le<uint64_t>(out, kShardStrideAt, shape.shard_stride());
  put_le<uint64_t>(out, kShardBytesAt, shape.shard_bytes());
  put_le<uint64_t>(out, kStoredAtAt, header.stored_at_ns);
  put_le<uint16_t>(out, kGroupAt, header.group);
  put_le<uint8_t>(out, kKindAt, static_cast<uint8_t>(header.kind));
  put_le<uint16_t>(out, kPartAt, header.part.layer_begin);
  put_le<uint16_t>(out, kPartAt + 2, header.part.layer_end);
  put_le<uint16_t>(out, kPartAt + 4, header.part.head_begin);
  put_le<uint16_t>(out, kPartAt + 6, header.part.head_end);
  put_le<uint32_t>(out, kTokensAt, header.tokens);
  put_le<uint32_t>(out, kBlockTokensAt, header.block_tokens);
  put_le<uint16_t>(out, kPlanesAt, header.planes);
  put_le<uint32_t>(out, kRowBytesAt, header.row_bytes);
  put_le<uint32_t>(out, kPageBytesAt, header.page_bytes);
  std::memcpy(out.data() + kShardDigestsAt, header.shard_digests.data(), header.shard_digests.size() * 8);
  put_le<uint64_t>(out, kDigestAt, header_digest(out));
}

Result<ExtentHeader> decode_extent_header(std::span<const std::byte> bytes) {
  if (bytes.size() < kPageBytes || std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return fail(ErrorKind::corrupt, "extent header of {} bytes does not start with the header's magic",
                bytes.size());
  }
  if (const uint32_t version = get_le<uint32_t>(bytes, kVersionAt); version != kFormatVersion) {
    return fail(ErrorKind::unsupported, "extent header has format version {}, this program reads version {}",
                version, kFormatVersion);
  }
  const uint32_t shards = get_le<uint32_t>(bytes, kShardsAt);
  const uint64_t header_bytes = get_le<uint32_t>(bytes, kHeaderBytesAt);
  if (shards > kMaxShards || header_bytes != extent_header_bytes(shards) || header_bytes > bytes.size()) {
    return fail(ErrorKind::corrupt, "extent header says {} shards and {} header bytes, {} bytes are there",
                shards, header_bytes, bytes.size());
  }
  const std::span<const std::byte> in = bytes.first(header_bytes);
  const uint64_t stored = get_le<uint64_t>(in, kDigestAt);
  const uint64_t digest = header_digest(in);
  if (stored != digest) {
    return fail(ErrorKind::corrupt, "extent header has digest {:016x}, its bytes give {:016x}", stored,
                digest);
  }
  const size_t digests_end = kShardDigestsAt + size_t{8} * shards;
  if (get_le<uint8_t>(in, kReserved1At) != 0 || get_le<uint16_t>(in, kReserved2At) != 0 ||
      !all_zero(in.subspan(kReserved3At, kShardDigestsAt - kReserved3At)) ||
      !all_zero(in.subspan(digests_end))) {
    return fail(ErrorKind::corrupt, "extent header has reserved bytes that are not zero");
  }
  Result<ExtentHeader> header = decode_fields(in);
  if (!header) return header;
  header->shard_digests.resize(shards);
  std::memcpy(header->shard_digests.data(), in.data() + kShardDigestsAt, size_t{8} * shards);
  return header;
}

}  // namespace tokendepot
