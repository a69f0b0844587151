// Any bytes as a root's policies and keeper's notes, as they are and with magic, version and digest made
// right.
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "format/digest.h"
#include "format/keeper_notes.h"
#include "format/policies.h"

namespace {

void decode(std::span<const std::byte> bytes) {
  if (const auto policies = tokendepot::decode_policies(bytes)) {
    const auto again = tokendepot::encode_policies(*policies);
    TD_CHECK(again.size() == bytes.size() && std::memcmp(again.data(), bytes.data(), again.size()) == 0);
  }
  if (const auto notes = tokendepot::decode_keeper_notes(bytes)) {
    std::array<std::byte, tokendepot::kKeeperNotesBytes> again;
    tokendepot::encode_keeper_notes(*notes, again);
    TD_CHECK(again.size() == bytes.size() && std::memcmp(again.data(), bytes.data(), again.size()) == 0);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  decode(std::as_bytes(std::span(data, size)));
  for (const char* start : {"TDPOLICY\1\0\0", "TDKEEPER\1\0\0"}) {
    std::vector<std::byte> sealed(std::max<size_t>(size, 32));
    if (size > 0) std::memcpy(sealed.data(), data, size);
    std::memcpy(sealed.data(), start, 12);
    const uint64_t digest = tokendepot::xxh3(std::span(sealed).first(sealed.size() - 8));
    std::memcpy(sealed.data() + sealed.size() - 8, &digest, sizeof digest);
    decode(sealed);
  }
  return 0;
}
