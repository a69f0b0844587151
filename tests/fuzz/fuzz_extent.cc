// Any bytes as an extent header: as they are, with the digest made right, and with the sizes made right too,
// so that every check is reached and passed.
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/bytes.h"
#include "base/check.h"
#include "format/digest.h"
#include "format/extent.h"
#include "format/shape.h"

namespace {

using tokendepot::get_le;
using tokendepot::put_le;
using Bytes = std::vector<std::byte>;

void decode(std::span<const std::byte> bytes) {
  const auto header = tokendepot::decode_extent_header(bytes);
  if (!header) return;
  Bytes again(tokendepot::extent_header_bytes(header->shape().shards()));
  TD_CHECK(again.size() <= bytes.size());
  tokendepot::encode_extent_header(*header, again);
  TD_CHECK(std::memcmp(again.data(), bytes.data(), again.size()) == 0);
}

void seal(Bytes& bytes) {
  put_le<uint32_t>(bytes, 12, static_cast<uint32_t>(bytes.size()));
  put_le<uint64_t>(bytes, 168, 0);
  put_le<uint64_t>(bytes, 168, tokendepot::shard_digest(bytes));
}

// The sizes that follow from the shape fields, and zero where nothing is kept.
void make_sizes_right(Bytes& bytes) {
  tokendepot::GroupShape shape;
  shape.kind = static_cast<tokendepot::LayoutKind>(get_le<uint8_t>(bytes, 138));
  shape.part = {.layer_begin = get_le<uint16_t>(bytes, 140),
                .layer_end = get_le<uint16_t>(bytes, 142),
                .head_begin = get_le<uint16_t>(bytes, 144),
                .head_end = get_le<uint16_t>(bytes, 146)};
  shape.tokens = get_le<uint32_t>(bytes, 148);
  shape.block_tokens = get_le<uint32_t>(bytes, 152);
  shape.planes = get_le<uint16_t>(bytes, 156);
  shape.row_bytes = get_le<uint32_t>(bytes, 160);
  shape.page_bytes = get_le<uint32_t>(bytes, 164);
  if (!tokendepot::check_shape(shape)) return;
  put_le<uint32_t>(bytes, 92, shape.shards());
  put_le<uint64_t>(bytes, 104, shape.payload_bytes());
  put_le<uint64_t>(bytes, 112, shape.shard_stride());
  put_le<uint64_t>(bytes, 120, shape.shard_bytes());
  put_le<uint8_t>(bytes, 139, 0);
  put_le<uint16_t>(bytes, 158, 0);
  std::memset(bytes.data() + 176, 0, 80);
  const size_t digests_end = 256 + size_t{8} * shape.shards();
  bytes.resize(tokendepot::align_up(digests_end));
  std::memset(bytes.data() + digests_end, 0, bytes.size() - digests_end);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  decode(std::as_bytes(std::span(data, size)));

  Bytes bytes(tokendepot::align_up(size + 1));
  if (size > 0) std::memcpy(bytes.data(), data, size);
  std::memcpy(bytes.data(), "TDEXTENT\1\0\0", 12);
  seal(bytes);
  decode(bytes);
  make_sizes_right(bytes);
  seal(bytes);
  decode(bytes);
  return 0;
}
