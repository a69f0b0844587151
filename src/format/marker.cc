#include "format/marker.h"

#include <algorithm>
#include <string_view>

#include "base/bytes.h"
#include "base/errors.h"
#include "format/digest.h"
#include "format/extent.h"

namespace tokendepot {
namespace {

constexpr std::string_view kMagic = "TDDEPOT\n";
constexpr size_t kVersionAt = 8;
constexpr size_t kIdAt = 16;
constexpr size_t kCreatedAt = 32;
constexpr size_t kFieldsEnd = 40;
constexpr size_t kDigestAt = kPageBytes - 8;

}  // namespace

void encode_marker(const Marker& marker, std::span<std::byte, kPageBytes> out) {
  std::ranges::fill(out, std::byte{0});
  std::memcpy(out.data(), kMagic.data(), kMagic.size());
  put_le<uint32_t>(out, kVersionAt, kFormatVersion);
  std::memcpy(out.data() + kIdAt, marker.root_id.data(), marker.root_id.size());
  put_le<uint64_t>(out, kCreatedAt, marker.created_ns);
  put_le<uint64_t>(out, kDigestAt, xxh3(out.first(kDigestAt)));
}

Result<Marker> decode_marker(std::span<const std::byte> bytes) {
  if (bytes.size() < kVersionAt + sizeof(uint32_t) ||
      std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return fail(ErrorKind::corrupt, "marker of {} bytes does not start with the marker's magic",
                bytes.size());
  }
  const uint32_t version = get_le<uint32_t>(bytes, kVersionAt);
  if (version != kFormatVersion) {
    return fail(ErrorKind::unsupported, "marker has format version {}, this program reads version {}",
                version, kFormatVersion);
  }
  if (bytes.size() != kPageBytes) {
    return fail(ErrorKind::corrupt, "marker has {} bytes, expected {}", bytes.size(), kPageBytes);
  }
  const uint64_t stored = get_le<uint64_t>(bytes, kDigestAt);
  const uint64_t digest = xxh3(bytes.first(kDigestAt));
  if (stored != digest) {
    return fail(ErrorKind::corrupt, "marker has digest {:016x}, its bytes give {:016x}", stored, digest);
  }
  const auto is_zero = [](std::byte b) { return b == std::byte{0}; };
  if (!std::ranges::all_of(bytes.subspan(12, kIdAt - 12), is_zero) ||
      !std::ranges::all_of(bytes.subspan(kFieldsEnd, kDigestAt - kFieldsEnd), is_zero)) {
    return fail(ErrorKind::corrupt, "marker has reserved bytes that are not zero");
  }
  Marker marker;
  std::memcpy(marker.root_id.data(), bytes.data() + kIdAt, marker.root_id.size());
  marker.created_ns = get_le<uint64_t>(bytes, kCreatedAt);
  return marker;
}

}  // namespace tokendepot
