// Which chunks were stored once and are not any more, as an estimate of fixed size.
//
// A table of 2^20 fingerprints of 16 bits, 2 MiB: the place comes from 20 bits of the key, the fingerprint
// from 16 others; a newer key takes an older one's place. A key that never was here is taken for gone with a
// probability of at most 1/65,535; one that is gone is forgotten with probability 1 - exp(-n / 2^20) once n
// others have gone after it. Not thread-safe beyond its single words: relaxed atomics, nothing is ordered.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace tokendepot {

class GoneKeys {
 public:
  /// `word`: 8 bytes of the key, which is a SHA-256 and thus random.
  void add(uint64_t word) { slot(word).store(fingerprint(word), std::memory_order_relaxed); }
  bool holds(uint64_t word) const { return slot(word).load(std::memory_order_relaxed) == fingerprint(word); }

  static constexpr uint64_t kSlots = 1 << 20;

 private:
  std::atomic<uint16_t>& slot(uint64_t word) const { return table_[word % kSlots]; }
  /// 0 is an empty place.
  static uint16_t fingerprint(uint64_t word) { return static_cast<uint16_t>((word >> 20) % UINT16_MAX + 1); }

  const std::unique_ptr<std::atomic<uint16_t>[]> table_ = std::make_unique<std::atomic<uint16_t>[]>(kSlots);
};

}  // namespace tokendepot
