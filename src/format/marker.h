// The file DEPOT that makes a directory a root: 4 KiB, written once, never changed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "tokendepot/error.h"
#include "tokendepot/layout.h"

namespace tokendepot {

struct Marker {
  std::array<uint8_t, 16> root_id{};  // random
  uint64_t created_ns = 0;            // wall clock
  bool operator==(const Marker&) const = default;
};

void encode_marker(const Marker& marker, std::span<std::byte, kPageBytes> out);
/// `corrupt` for anything that is not a marker, `unsupported` (naming both versions) for another format
/// version.
Result<Marker> decode_marker(std::span<const std::byte> bytes);

}  // namespace tokendepot
