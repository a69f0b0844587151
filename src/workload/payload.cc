#include "workload/payload.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "workload/stamp_word.h"

namespace tokendepot {
namespace {

constexpr uint64_t kWord = sizeof(uint64_t);

uint64_t tile_word(uint32_t process, uint64_t index) {
  return scramble((index + 1) * 0x9e3779b97f4a7c15ull + (uint64_t{process} << 40));
}

void stamp_units(std::span<std::byte> memory, const PayloadId& id, uint64_t first_unit) {
  for (uint64_t at = 0; at < memory.size(); at += kStampEvery) {
    const uint64_t word = stamp_word(id.process, id.serial, first_unit + at / kStampEvery);
    std::memcpy(memory.data() + at, &word, kWord);
  }
}

}  // namespace

void fill_tile(std::span<std::byte> memory, uint32_t process, uint64_t tile_at) {
  TD_CHECK(tile_at % kWord == 0 && memory.size() % kWord == 0);
  for (uint64_t at = 0; at < memory.size(); at += kWord) {
    const uint64_t word = tile_word(process, (tile_at + at) / kWord);
    std::memcpy(memory.data() + at, &word, kWord);
  }
}

void stamp_payload(std::span<std::byte> payload, const PayloadId& id) {
  stamp_units(payload, id, 0);
}

std::optional<uint64_t> first_difference(std::span<const std::byte> payload, const PayloadId& id) {
  constexpr uint64_t kStep = 64 * kStampEvery;
  std::byte expected[kStep];
  for (uint64_t at = 0; at < payload.size(); at += kStep) {
    const uint64_t bytes = std::min<uint64_t>(kStep, payload.size() - at);
    fill_tile({expected, bytes}, id.process, id.tile_at + at);
    stamp_units({expected, bytes}, id, at / kStampEvery);
    if (std::memcmp(payload.data() + at, expected, bytes) == 0) continue;
    const auto differs = std::mismatch(expected, expected + bytes, payload.data() + at);
    return at + static_cast<uint64_t>(differs.first - expected);
  }
  return std::nullopt;
}

}  // namespace tokendepot
