// Any bytes as a root's marker, as they are and with magic, version and digest made right.
#include <array>
#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "format/digest.h"
#include "format/marker.h"

namespace {

using Page = std::array<std::byte, tokendepot::kPageBytes>;

void decode(std::span<const std::byte> bytes) {
  const auto marker = tokendepot::decode_marker(bytes);
  if (!marker) return;
  Page again;
  tokendepot::encode_marker(*marker, again);
  TD_CHECK(bytes.size() == again.size() && std::memcmp(again.data(), bytes.data(), again.size()) == 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  decode(std::as_bytes(std::span(data, size)));

  Page page{};
  if (size > 0) std::memcpy(page.data(), data, size < page.size() ? size : page.size());
  std::memcpy(page.data(), "TDDEPOT\n\1\0\0", 12);
  const uint64_t digest = tokendepot::xxh3(std::span(page).first(page.size() - 8));
  std::memcpy(page.data() + page.size() - 8, &digest, sizeof digest);
  decode(page);
  return 0;
}
