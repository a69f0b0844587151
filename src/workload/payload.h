// Bytes that no medium can shrink, and that belong to one place only.
//
// A tile of random words fills the memory that extents are stored from; before a store, the first word of
// every 512 bytes is replaced by a stamp that no other 512 bytes of any extent have. The next use of the same
// memory is therefore new data for whoever removes duplicates or compresses, for an eighth of the memory
// traffic of filling it anew.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace tokendepot {

/// What an extent was stored with.
struct PayloadId {
  uint32_t process = 0;  // below 2^11
  uint32_t serial = 0;   // of the store, in its process
  uint64_t tile_at = 0;  // where in the tile the memory lies that it was stored from
};

/// Fills `memory`, a multiple of 8 bytes, with the tile's bytes from `tile_at` on, a multiple of 8, too.
void fill_tile(std::span<std::byte> memory, uint32_t process, uint64_t tile_at);

/// Replaces the first word of every 512 bytes.
void stamp_payload(std::span<std::byte> payload, const PayloadId& id);

/// Where the first byte lies that is not what the extent was stored with. Generates anew what it compares
/// with.
std::optional<uint64_t> first_difference(std::span<const std::byte> payload, const PayloadId& id);

}  // namespace tokendepot
