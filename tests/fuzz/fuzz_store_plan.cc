// Any bytes as a store plan, as they are and with magic, version, reserved bytes and digest made right.
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "format/digest.h"
#include "tokendepot/plan.h"

namespace {

constexpr size_t kHeadBytes = 56;

void decode(const std::vector<std::byte>& bytes) {
  const auto plan = tokendepot::decode_store_plan(bytes);
  if (plan) TD_CHECK(tokendepot::encode(*plan) == bytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto* first = reinterpret_cast<const std::byte*>(data);
  std::vector<std::byte> bytes(first, first + size);
  decode(bytes);

  if (size < kHeadBytes) return 0;
  std::memcpy(bytes.data(), "TDSTORPL\1\0\0", 12);
  std::memset(bytes.data() + kHeadBytes - 8, 0, 8);
  const uint64_t digest = tokendepot::xxh3(bytes);
  bytes.resize(size + sizeof digest);
  std::memcpy(bytes.data() + size, &digest, sizeof digest);
  decode(bytes);
  return 0;
}
