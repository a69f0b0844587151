// Any bytes as a journal record, as they are and with magic, place and digest made right.
#include <array>
#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "format/digest.h"
#include "format/journal.h"

namespace {

using Slot = std::array<std::byte, tokendepot::kRecordBytes>;

void decode(const Slot& slot, uint64_t journal, uint64_t index) {
  const auto record = tokendepot::decode_record(slot, journal, index);
  if (!record) return;
  Slot again;
  tokendepot::encode_record(*record, again);
  TD_CHECK(again == slot);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Slot slot{};
  if (size > 0) std::memcpy(slot.data(), data, size < slot.size() ? size : slot.size());
  decode(slot, 0, 0);

  uint64_t index = 0;
  uint64_t journal = 0;
  std::memcpy(slot.data(), "TDJR\1\0", 6);
  std::memcpy(&index, slot.data() + 8, sizeof index);
  std::memcpy(&journal, slot.data() + 16, sizeof journal);
  const uint64_t digest = tokendepot::xxh3(std::span(slot).first(120));
  std::memcpy(slot.data() + 120, &digest, sizeof digest);
  decode(slot, journal, index);
  return 0;
}
