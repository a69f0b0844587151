// The relations that every extent shape keeps, checked before any size is computed from it.
#pragma once

#include <cstdint>

#include "tokendepot/error.h"
#include "tokendepot/layout.h"

namespace tokendepot {

inline constexpr uint32_t kMaxShards = 65536;
inline constexpr uint32_t kMaxTokens = 1u << 20;
inline constexpr uint32_t kMaxRowBytes = 1u << 30;  // of a row and of a page
inline constexpr uint64_t kMaxPayloadBytes = 1ull << 40;
inline constexpr uint64_t kMaxOffset = 1ull << 62;  // of an extent in its segment

/// ok = every GroupShape member function gives a number that did not overflow, and the payload is neither
/// empty nor larger than kMaxPayloadBytes. `invalid_argument` names the field, its value and what is allowed.
Status check_shape(const GroupShape& shape);

}  // namespace tokendepot
