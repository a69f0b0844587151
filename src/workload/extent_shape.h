// Which chunk of a model has extents of a given size.
#pragma once

#include <cstdint>

#include "tokendepot/layout.h"

namespace tokendepot {

inline constexpr uint64_t kSmallestExtent = kPageBytes;
inline constexpr uint64_t kLargestExtent = 256ull << 20;

/// A canonical shape whose payload is exactly `bytes`, a multiple of 4 KiB within the bounds above: rows of
/// 256 bytes, blocks of 16 tokens, as many of 8 heads and 256 tokens as divide it.
GroupShape shape_of_bytes(uint16_t group, uint64_t bytes);

/// Lays `slots` chunks of that shape one behind the other from `base` on; within a block (layer, K or V,
/// head, token, row).
PagedCache cache_of_slots(const GroupShape& shape, std::byte* base, uint32_t slots);

}  // namespace tokendepot
