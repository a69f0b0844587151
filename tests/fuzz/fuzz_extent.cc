// Any bytes as an extent header, as they are and with the digest made right, so that the checks behind it are
// reached.
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "format/digest.h"
#include "format/extent.h"

namespace {

constexpr size_t kDigestAt = 168;

void decode(std::span<const std::byte> bytes) {
  const auto header = tokendepot::decode_extent_header(bytes);
  if (!header) return;
  std::vector<std::byte> again(tokendepot::extent_header_bytes(header->shape().shards()));
  TD_CHECK(again.size() <= bytes.size());
  tokendepot::encode_extent_header(*header, again);
  TD_CHECK(std::memcmp(again.data(), bytes.data(), again.size()) == 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> input = std::as_bytes(std::span(data, size));
  decode(input);

  std::vector<std::byte> sealed(tokendepot::align_up(size < 1 ? 1 : size));
  if (size > 0) std::memcpy(sealed.data(), data, size);
  std::memcpy(sealed.data(), "TDEXTENT\1\0\0", 12);
  const auto header_bytes = static_cast<uint32_t>(sealed.size());
  std::memcpy(sealed.data() + 12, &header_bytes, sizeof header_bytes);
  std::memset(sealed.data() + kDigestAt, 0, 8);
  const uint64_t digest = tokendepot::shard_digest(sealed);
  std::memcpy(sealed.data() + kDigestAt, &digest, sizeof digest);
  decode(sealed);
  return 0;
}
