// SHA-256 in pieces. One context a thread is reused, so that hashing allocates nothing.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace tokendepot {

/// One message at a time on each thread: a second Sha256 may start only when finish() of the first was
/// called.
class Sha256 {
 public:
  Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  Sha256& update(std::span<const std::byte> bytes);
  Sha256& update(std::string_view text) { return update(std::as_bytes(std::span(text))); }
  /// The number as 1 to 8 little-endian bytes.
  Sha256& update_le(uint64_t value, size_t bytes = 8);
  std::array<uint8_t, 32> finish();
};

std::array<uint8_t, 32> sha256(std::string_view text);

}  // namespace tokendepot
