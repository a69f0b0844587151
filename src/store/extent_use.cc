#include "store/extent_use.h"

namespace tokendepot {
namespace {

constexpr uint32_t kTickBits = 20;  // ns, about 1 ms

uint64_t name_of(uint32_t slot, uint64_t offset) {  // splitmix64's finaliser
  uint64_t x = (uint64_t{slot} << 32) ^ (offset >> 12);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

uint64_t use_at(uint64_t seat, uint64_t name, uint64_t now_ns) {
  if (seat == 0 || seat >> 32 != name >> 32) return 0;
  const auto age = static_cast<uint32_t>(now_ns >> kTickBits) - static_cast<uint32_t>(seat);
  return now_ns - (uint64_t{age} << kTickBits);
}

}  // namespace

uint64_t ExtentUse::exchange(uint32_t slot, uint64_t offset, uint64_t now_ns) {
  const uint64_t name = name_of(slot, offset);
  const uint64_t fresh = (name >> 32 << 32) | static_cast<uint32_t>(now_ns >> kTickBits);
  return use_at(seats_[name % kSeats].exchange(fresh, std::memory_order_relaxed), name, now_ns);
}

uint64_t ExtentUse::last(uint32_t slot, uint64_t offset, uint64_t now_ns) const {
  const uint64_t name = name_of(slot, offset);
  return use_at(seats_[name % kSeats].load(std::memory_order_relaxed), name, now_ns);
}

}  // namespace tokendepot
