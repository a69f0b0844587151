#include "workload/payload.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace tokendepot {
namespace {

constexpr uint64_t kWord = sizeof(uint64_t);
constexpr unsigned kIndexBits = 21;  // 1 GiB of 512 bytes
constexpr unsigned kProcessAt = 53;

/// SplitMix64's finaliser (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014): a
/// bijection of 64-bit words, so what differs before differs behind it.
uint64_t scramble(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

uint64_t tile_word(uint32_t process, uint64_t index) {
  return scramble((index + 1) * 0x9e3779b97f4a7c15ull + (uint64_t{process} << 40));
}

}  // namespace

void fill_tile(std::span<std::byte> memory, uint32_t process, uint64_t tile_at) {
  TD_CHECK(tile_at % kWord == 0 && memory.size() % kWord == 0);
  for (uint64_t at = 0; at < memory.size(); at += kWord) {
    const uint64_t word = tile_word(process, (tile_at + at) / kWord);
    std::memcpy(memory.data() + at, &word, kWord);
  }
}

void make_stamps(std::span<uint64_t> stamps, const PayloadId& id) {
  const uint64_t extent = uint64_t{id.process} << kProcessAt | uint64_t{id.serial} << kIndexBits;
  for (uint64_t i = 0; i < stamps.size(); ++i) stamps[i] = scramble(extent | i);
}

std::optional<uint64_t> first_difference(std::span<const std::byte> payload, const PayloadId& id) {
  constexpr uint64_t kStep = 64 * kStampEvery;
  std::byte expected[kStep];
  const uint64_t extent = uint64_t{id.process} << kProcessAt | uint64_t{id.serial} << kIndexBits;
  for (uint64_t at = 0; at < payload.size(); at += kStep) {
    const uint64_t bytes = std::min<uint64_t>(kStep, payload.size() - at);
    fill_tile({expected, bytes}, id.process, id.tile_at + at);
    for (uint64_t unit = 0; unit < bytes; unit += kStampEvery) {
      const uint64_t stamp = scramble(extent | (at + unit) / kStampEvery);
      std::memcpy(expected + unit, &stamp, kWord);
    }
    if (std::memcmp(payload.data() + at, expected, bytes) == 0) continue;
    const auto differs = std::mismatch(expected, expected + bytes, payload.data() + at);
    return at + static_cast<uint64_t>(differs.first - expected);
  }
  return std::nullopt;
}

}  // namespace tokendepot
